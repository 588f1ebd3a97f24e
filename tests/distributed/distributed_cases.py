"""What every rank runs, and the same in one process. Nothing here depends on the number of ranks but the splits."""

import torch
import torch.distributed as dist

from otkd_fast import cost_matrix, sinkhorn
from otkd_fast.distributed import GlobalBatch, all_gather_rows, sinkhorn_sharded
from otkd_fast.losses import KD2M, SinKD, SinkhornDivergenceLoss, wcord_local

ROWS, CLASSES = 11, 6
# rows of each rank; also none
SPLITS = {1: [11], 2: [4, 7], 4: [5, 0, 2, 4]}
LOSSES = {
    "sinkd": lambda: SinKD(),
    "sinkd mean": lambda: SinKD(reduction="mean"),
    "w2": lambda: KD2M(),
    "cw2_gaussian": lambda: KD2M(metric="cw2_gaussian"),
    "mmd": lambda: KD2M(metric="mmd", kernel="rbf"),
    "w2 sinkhorn": lambda: KD2M(solver="sinkhorn"),
    "w2_gaussian full": lambda: KD2M(metric="w2_gaussian", covariance="full"),
    "sinkd flattened": lambda: SinKD(form="flattened"),
    "divergence": lambda: SinkhornDivergenceLoss(epsilon=0.5),
    "wcord": lambda: wcord_local,
}
SHARDED = {
    "a first": {"epsilon": 0.1, "num_iters": 7},
    "b first": {"epsilon": 0.1, "num_iters": 7, "update_first": "b"},
    "one iteration": {"epsilon": 0.05, "num_iters": 1},
    "masses": {"epsilon": 0.1, "num_iters": 5},
    "forbidden": {"epsilon": 0.1, "num_iters": 5, "update_first": "b"},
    "small epsilon": {"epsilon": 0.002, "num_iters": 5},
    "detach": {"epsilon": 0.1, "num_iters": 5, "gradient": "detach"},
}
OUTPUTS = {
    "transport_cost": lambda r, weights: r.transport_cost,
    "regularized_cost": lambda r, weights: r.regularized_cost,
    "both": lambda r, weights: 2 * r.transport_cost - r.regularized_cost,
    "columns": lambda r, weights: (weights * r.g).sum(),
}


def data():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (ROWS,), generator=generator)
    mask = torch.rand(ROWS, generator=generator) < 0.8
    return x, teacher, labels, mask


def model():
    torch.manual_seed(1)
    return torch.nn.Linear(5, CLASSES, dtype=torch.float64)


def own_rows(rank, world):
    splits = SPLITS[world]
    start = sum(splits[:rank])
    return slice(start, start + splits[rank])


def problem(name):
    """Cost, a and b of the whole problem."""
    _, teacher, _, _ = data()
    student = data()[0] @ torch.linspace(-1, 1, 5 * CLASSES, dtype=torch.float64).reshape(5, CLASSES)
    cost = cost_matrix(student, teacher[:9], metric="l1", softmax_temperature=2.0)
    a = b = None
    if name in ("masses", "forbidden"):
        a, b = torch.linspace(0, 2, ROWS, dtype=torch.float64), torch.linspace(3, 0, 9, dtype=torch.float64)
        a, b = a / a.sum(), b / b.sum()
    if name == "forbidden":
        cost[3:6, 2:4] = torch.inf
    return cost, a, b


def gradients_of_losses(rank, world, reduced_by, wrap):
    """Value and gradients of the model's parameters for each loss, as the training loop sees them."""
    x, teacher, labels, mask = (t[own_rows(rank, world)] for t in data())
    answers = {}
    for name, make in LOSSES.items():
        network = model()
        trained = wrap(network)
        loss = GlobalBatch(make(), reduced_by=reduced_by) if world > 1 else make()
        given = {"mask": mask}
        if name == "cw2_gaussian":
            given["labels"] = labels
        value = loss(trained(x), teacher, **given)
        value.backward()
        answers[name] = [value.detach(), *(p.grad for p in network.parameters())]
    return answers


def gradients_of_sharded(rank, world, reduced_by):
    """Value, g, and the gradients of the own rows' cost, of a and of b."""
    own, answers = own_rows(rank, world), {}
    weights = torch.linspace(-1, 1, 9, dtype=torch.float64)
    for name, options in SHARDED.items():
        cost, a, b = problem(name)
        leaves = [cost[own].clone(), *(() if a is None else (a[own].clone(), b.clone()))]
        if options.get("gradient") == "detach":
            leaves = leaves[:1]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        for output, of in OUTPUTS.items():
            if options.get("gradient") == "detach" and output != "transport_cost":
                continue
            if world > 1:
                result = sinkhorn_sharded(*leaves, reduced_by=reduced_by, **options)
            else:
                result = sinkhorn(*leaves, backend="reference", **options)
            # masses of 0 have no potential
            value = of(torch_finite(result), weights)
            grads = torch.autograd.grad(value, leaves, allow_unused=True)
            grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
            answers[name, output] = [value.detach(), result.marginal_error, result.plan().detach(), *grads]
    return answers


def gradients_of_both_models(rank, world, reduced_by, wrap):
    """A teacher that is trained too: its rows are gathered for the columns, each rank sends back its contribution."""
    x = data()[0][own_rows(rank, world)]
    student, teacher = model(), torch.nn.Linear(5, CLASSES, dtype=torch.float64)
    trained = wrap(student), wrap(teacher)  # kept: DDP's hooks go with it
    s, t = (network(x) for network in trained)
    if world > 1:
        cost = cost_matrix(s, all_gather_rows(t, same_loss=False), metric="l1", softmax_temperature=2.0)
        result = sinkhorn_sharded(cost, epsilon=0.1, num_iters=5, reduced_by=reduced_by)
    else:
        cost = cost_matrix(s, t, metric="l1", softmax_temperature=2.0)
        result = sinkhorn(cost, epsilon=0.1, num_iters=5)
    result.transport_cost.backward()
    return [result.transport_cost.detach(), *(p.grad for m in (student, teacher) for p in m.parameters())]


def torch_finite(result):
    class Finite:
        transport_cost, regularized_cost = result.transport_cost, result.regularized_cost
        g = torch.where(result.g > -torch.inf, result.g, 0)

    return Finite


def gathers(rank, world):
    """all_gather_rows of what is not floating point, with a loss of each rank's own, and without rows to exchange."""
    x, teacher, labels, mask = (t[own_rows(rank, world)] for t in data())
    answers = {"labels": all_gather_rows(labels), "mask": all_gather_rows(mask)}
    leaf = teacher.clone().requires_grad_()
    gathered = all_gather_rows(leaf, same_loss=False)
    weights = torch.arange(ROWS * CLASSES, dtype=torch.float64).reshape(ROWS, CLASSES) * (rank + 1)
    answers["own loss"] = torch.autograd.grad((weights * gathered).sum(), leaf)[0]
    two = data()[1][2 * rank : 2 * rank + 2]
    answers["equal sizes"] = all_gather_rows(two, equal_sizes=True)
    answers["half"] = all_gather_rows(teacher.bfloat16())
    return answers


def ddp(network):
    return torch.nn.parallel.DistributedDataParallel(network)


def summed_afterwards(answers):
    for values in answers.values():
        for gradient in values[1:]:
            dist.all_reduce(gradient)
    return answers


def run_rank(rank, world, folder):
    """The entry point of a rank: writes its answers to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        answers = {
            "ddp": gradients_of_losses(rank, world, "mean", ddp),
            "sum": summed_afterwards(gradients_of_losses(rank, world, "sum", lambda network: network)),
            "both ddp": gradients_of_both_models(rank, world, "mean", ddp),
            "both sum": summed_afterwards({0: gradients_of_both_models(rank, world, "sum", lambda m: m)})[0],
            "sharded mean": gradients_of_sharded(rank, world, "mean"),
            "sharded sum": gradients_of_sharded(rank, world, "sum"),
            "gathers": gathers(rank, world),
        }
        torch.save(answers, f"{folder}/rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
