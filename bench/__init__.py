"""Benchmarks: pytest-benchmark suites (bench/test_*.py), `python -m bench.run` and `python -m bench.report`."""
