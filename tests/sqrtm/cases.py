"""What the tests of sqrtm share: algorithms that run here, condition numbers, float64 answers."""

import torch

from otkd_fast.testing import backends, spectrum

DTYPES = (torch.float64, torch.float32)
ALGORITHMS = ("auto", "eigh", "polar")

# (backend, algorithm): those that keep the accuracy contract
RUNS = [(backend, algorithm) for backend in backends("sqrtm") for algorithm in ALGORITHMS]
RUNS += [(b, algorithm) for b in backends("sqrtm", compiled_only=True) for algorithm in ("jacobi", "tridiagonal")]


def condition(name, d):
    """Condition number of the spectrum; inf where it is singular."""
    values = spectrum(name, d)
    return float(values[0] / values[-1])


def root(A, power=0.5):
    """A^power by eigenvalues in float64, those below 0 taken as 0."""
    values, V = torch.linalg.eigh(A.double())
    return (V * values.clamp(min=0).pow(power).unsqueeze(-2)) @ V.mT


def lyapunov(A, G):
    """X with S X + X S = G, S = A^(1/2), in the eigenbasis and the dtype of A."""
    values, V = torch.linalg.eigh(A)
    s = values.clamp(min=0).sqrt()
    return V @ ((V.mT @ ((G + G.mT) / 2) @ V) / (s.unsqueeze(-1) + s.unsqueeze(-2))) @ V.mT
