"""docs/numerics.md shows the bounds that the tests use."""

from pathlib import Path

import pytest
import torch

from otkd_fast.testing import TOLERANCES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "numerics.md"
OPS = ("polar", "sqrtm", "gaussian_wasserstein", "bures_distance", "feature_moments")


def entries():
    """(op, quantity) -> the two numbers of the page."""
    section = PAGE.read_text().split("### Accuracy contract")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in section.splitlines() if line.startswith("| ")]
    named = [(row[1].strip("`").split(" "), row[2], row[3].strip("| ")) for row in rows]
    return {tuple(name): (narrow, wide) for name, narrow, wide in named if len(name) == 2}


@pytest.mark.skipif(not PAGE.exists(), reason="the tests run without the repository")
def test_the_page_and_the_table_are_the_same():
    page = entries()
    bounds = {key for key in TOLERANCES if key[0] in OPS and key != ("feature_moments", "gradient")}
    assert set(page) == bounds
    for key, numbers in page.items():
        for number, dtype in zip(numbers, (torch.float32, torch.float64), strict=True):
            assert float(number) == max(TOLERANCES[key][dtype]), key
