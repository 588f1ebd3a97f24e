"""Wrong arguments of sinkhorn_ragged: the exception says which one, what was expected and what came."""

import pytest
import torch

import otkd_fast

NAN = float("nan")
OFFSETS = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 4])  # problems of 2 x 1 and 1 x 3
POINTS = torch.ones(3, 2), torch.ones(4, 2)

WRONG = [
    ({"cost": [1.0]}, TypeError, ("cost:", "tensor (E,) or a pair (x, y)", "list")),
    ({"cost": torch.ones(5, 1)}, ValueError, ("cost:", "(E,)", "(5, 1)")),
    ({"cost": torch.ones(5).long()}, TypeError, ("cost:", "float32", "int64")),
    ({"cost": torch.ones(6)}, ValueError, ("cost:", "5 entries", "(6,)")),
    ({"cost": POINTS}, ValueError, ("metric:", "'l1'", "with points", "None")),
    ({"metric": "l1"}, ValueError, ("metric:", "None with packed costs", "'l1'")),
    ({"cost": POINTS, "metric": "l3"}, ValueError, ("metric:", "'l1'", "'l3'")),
    ({"cost": (torch.ones(3), torch.ones(4, 2)), "metric": "l1"}, ValueError, ("cost[0]:", "(N, d)", "(3,)")),
    ({"cost": (POINTS[0], torch.ones(4, 2, 1)), "metric": "l1"}, ValueError, ("cost[1]:", "(M, d)", "(4, 2, 1)")),
    ({"cost": (POINTS[0], torch.ones(4, 3)), "metric": "l1"}, ValueError, ("cost[1]:", "2 features", "(4, 3)")),
    ({"cost": (POINTS[0], POINTS[1].double()), "metric": "l1"}, ValueError, ("cost[1]:", "float32", "float64")),
    ({"cost": (torch.ones(3, 0), torch.ones(4, 0)), "metric": "cosine"}, ValueError, ("cost[0]:", "one feature")),
    ({"cost": (torch.ones(2, 2), POINTS[1]), "metric": "l1"}, ValueError, ("row_offsets:", "2 last", "got 3")),
    ({"row_offsets": [0, 2, 3]}, TypeError, ("row_offsets:", "tensor", "list")),
    ({"row_offsets": OFFSETS[0].float()}, TypeError, ("row_offsets:", "int32 or int64", "float32")),
    ({"row_offsets": OFFSETS[0][None]}, ValueError, ("row_offsets:", "(K + 1,)", "(1, 3)")),
    ({"row_offsets": OFFSETS[0][:0]}, ValueError, ("row_offsets:", "(K + 1,)", "(0,)")),
    ({"row_offsets": OFFSETS[0].to("meta")}, ValueError, ("row_offsets:", "cpu", "meta")),
    ({"row_offsets": torch.tensor([1, 2, 3])}, ValueError, ("row_offsets:", "0 first", "[1, 2, 3]")),
    ({"column_offsets": torch.tensor([0, 5, 4])}, ValueError, ("column_offsets:", "smaller", "[0, 5, 4]")),
    ({"column_offsets": torch.tensor([0, 1, 2, 4])}, ValueError, ("column_offsets:", "2 problems", "got 3")),
    ({"row_offsets": torch.tensor([0, 2, 4])}, ValueError, ("row_offsets:", "3 last", "got 4")),
    ({"a": torch.ones(3, 1)}, ValueError, ("a:", "(3,)", "(3, 1)")),
    ({"a": torch.ones(3).double()}, ValueError, ("a:", "float32", "float64")),
    ({"b": [0.5]}, TypeError, ("b:", "tensor", "list")),
    ({"a": torch.tensor([0.5, 0.5, -1.0])}, ValueError, ("a:", ">= 0", "-1.0")),
    ({"b": torch.tensor([1.0, 0.5, NAN, 0.2])}, ValueError, ("b:", ">= 0", "nan")),
    ({"b": torch.tensor([1.0, 0.0, 0.0, 0.0])}, ValueError, ("b:", "> 0", "problem 1")),
    ({"b": torch.tensor([1.0, 0.5, 0.5, 0.2])}, ValueError, ("b:", "total mass 1", "1.2", "problem 1")),
    ({"epsilon": -1.0}, ValueError, ("epsilon:", "> 0")),
    ({"initial_potentials": (torch.zeros(2), None)}, ValueError, ("initial_potentials[0]:", "(3,)", "(2,)")),
    ({"backend": "cuda"}, RuntimeError, ("'cuda'", "sinkhorn_ragged")),
]


@pytest.mark.parametrize(("changes", "error", "words"), WRONG)
def test_wrong_argument(changes, error, words):
    arguments = {
        "cost": torch.ones(5), "a": torch.tensor([0.5, 0.5, 1.0]), "b": torch.tensor([1.0, 0.5, 0.3, 0.2]),
        "row_offsets": OFFSETS[0], "column_offsets": OFFSETS[1], "epsilon": 0.1, "num_iters": 3,
    } | changes  # fmt: skip
    positional = [arguments.pop(name) for name in ("cost", "a", "b")]
    with pytest.raises(error) as caught:
        otkd_fast.sinkhorn_ragged(*positional, **arguments)
    for word in words:
        assert word in str(caught.value)


def test_totals_may_differ_under_a_penalty():
    a, b = torch.tensor([0.5, 0.5, 1.0]), torch.tensor([1.0, 0.5, 0.5, 0.2])
    offsets = {"row_offsets": OFFSETS[0].int(), "column_offsets": OFFSETS[1].int()}
    result = otkd_fast.sinkhorn_ragged(
        torch.ones(5), a, b, **offsets, epsilon=0.1, num_iters=300, marginal_penalty=(None, 1.0)
    )
    assert (result.marginal_error < 1e-6).all()
