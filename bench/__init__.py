"""Benchmarks: `python -m bench --help`, and pytest-benchmark suites (bench/test_*.py)."""
