"""`make docs`: the site builds, and a warning is an error."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pages = {str(page.relative_to(tmp_path)) for page in tmp_path.rglob("*.html")}
    wanted = {f"{page.relative_to(ROOT / 'docs').with_suffix('.html')}" for page in (ROOT / "docs").rglob("*.md")}
    assert wanted <= pages
    table = (tmp_path / "ops" / "sinkhorn.html").read_text()
    assert "executed on the host by the tests" in table  # the state of the backends, from the package's own table
    assert "Algorithm 1" in (tmp_path / "methods" / "sinkd.html").read_text()  # the section of losses.md
