"""A training step with each loss, as every rank runs it under DistributedDataParallel, and as one process does."""

import torch
import torch.distributed as dist
from every_loss import CASES, MASK, ROWS

WORLD = 2


class Step(torch.nn.Module):
    """A model and its loss, the parameters of the loss among those that are trained."""

    def __init__(self, name, part):
        super().__init__()
        torch.manual_seed(0)
        self.bound = CASES[name].make(reduction="mean").of_rows(part)
        self.loss = self.bound.loss if isinstance(self.bound.loss, torch.nn.Module) else None
        width = CASES[name].inputs()[0].shape[-1]
        self.network = torch.nn.Linear(width, width, dtype=torch.float64)

    def forward(self, x, teacher, mask):
        return self.bound(self.network(x), teacher, mask)


def part_of(rank):
    size = ROWS // WORLD
    return slice(rank * size, (rank + 1) * size)


def gradients(name, rank, wrap=lambda step: step):
    """Loss and gradients of one rank's rows."""
    part = part_of(rank)
    student, teacher = (x[part] for x in CASES[name].inputs())
    step = Step(name, part)
    trained = wrap(step)
    value = trained(student, teacher, MASK[part])
    value.backward()
    return [value.detach(), *(p.grad for p in step.parameters())]


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel
        torch.save({name: gradients(name, rank, ddp) for name in CASES}, f"{folder}/rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
