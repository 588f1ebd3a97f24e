"""Each loss in DistributedDataParallel on two processes (gloo): the gradients are the mean of those of the parts."""

import ddp_cases
import pytest
import torch
import torch.multiprocessing
from every_loss import CASES


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(ddp_cases.run_rank, args=(str(folder),), nprocs=ddp_cases.WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ddp_cases.WORLD)]


@pytest.mark.parametrize("name", list(CASES))
def test_step(ranks, name):
    (first, *gradients), (second, *others) = (ddp_cases.gradients(name, rank) for rank in range(2))
    torch.testing.assert_close(ranks[0][name][0], first, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(ranks[1][name][0], second, rtol=1e-9, atol=1e-14)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    for rank in range(2):
        for actual, one, two in zip(ranks[rank][name][1:], gradients, others, strict=True):
            torch.testing.assert_close(actual, (one + two) / 2, rtol=1e-9, atol=1e-14)
