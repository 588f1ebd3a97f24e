"""``sqrtm_fwd`` and ``sqrtm_bwd``: roots of symmetric positive semidefinite matrices (kernels: ``csrc/cpu/sqrtm.cpp``,
``csrc/cuda/sqrtm.cu``, ``csrc/cuda/sqrtm_large.cu``).

Which way runs is decided in :func:`chosen`, in one place. The kernels serve definite and, where that needs no
eigenvalues, semidefinite matrices; those of a batch that they leave (indefinite ones; singular ones in the inverse and
in the backward) are computed from eigenvalues in float64, as the reference does for 'eigh' and 'newton_schulz' as well.
On CUDA there are two, of eigenvalues up to d = 32 and of products beyond, which leave none; for 'eigh' and
'newton_schulz', and beyond d = 2048, the reference runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import sqrtm as reference
from . import _library
from ._library import native

KERNELS = {"jacobi": 0, "polar": 1, "tridiagonal": 2}
JACOBI_LIMIT = 24
# float32 sizes up to which csrc/cpu/sqrtm.cpp computes eigenvectors with a matrix in each lane, worth while in batches
# that fill the lanes of two threads or so; beyond, by halves, a matrix at a time, in any batch
LANES_LIMIT, LANES_BATCH = 96, 32
CUDA_JACOBI_LIMIT, CUDA_LIMIT = 32, 2048
# without a gradient, sizes that products serve faster than eigenvectors: with a matrix in each lane of a vector, and
# middle ones
ALONE, ALONE_BATCH, ALONE_MIDDLE = range(12, JACOBI_LIMIT + 1), 8, range(41, 129)


def chosen(algorithm: str, A: Tensor) -> str:
    """What 'auto' means for matrices A (..., d, d); other names stand for themselves."""
    if algorithm != "auto":
        return algorithm
    *batch, d, _ = A.shape
    if d <= JACOBI_LIMIT:
        return "jacobi"
    if A.dtype == torch.float32 and (d > LANES_LIMIT or _library.product(batch) >= LANES_BATCH):
        return "tridiagonal"
    return "polar"


def chosen_on_cuda(algorithm: str, d: int) -> str:
    """The same on CUDA: rotations by a warp, products for what is too large for these, whatever the compiled word."""
    if algorithm in ("eigh", "newton_schulz"):
        return algorithm
    if algorithm != "polar" and d <= CUDA_JACOBI_LIMIT:
        return "jacobi"
    return "polar" if d <= CUDA_LIMIT else "eigh"


def chosen_alone(algorithm: str, A: Tensor) -> str:
    """What 'auto' means where no gradient follows: products, without the eigenvectors, where they are faster."""
    if algorithm != "auto" or A.dtype != torch.float32:
        return algorithm
    side_by_side = A.shape[-1] in ALONE and _library.product(A.shape[:-2]) >= ALONE_BATCH
    return "polar" if side_by_side or A.shape[-1] in ALONE_MIDDLE else algorithm


def _aux(A: Tensor, algorithm: str) -> Tensor:
    """jacobi, tridiagonal: eigenvectors in rows, square roots of their eigenvalues; polar: bounds of these roots."""
    *batch, d, _ = A.shape
    if algorithm in ("jacobi", "tridiagonal"):
        return A.new_empty((*batch, d + 1, d))
    if algorithm == "polar":
        return A.new_empty((*batch, 2))
    return A.new_empty((*batch, d + 2, d) if algorithm == "eigh" else (0,), dtype=torch.float64)


def _fwd_fake(A: Tensor, inverse: bool, algorithm: str) -> tuple[Tensor, Tensor]:
    if A.device.type == "cuda":
        return A.new_empty(A.shape), _aux(A, chosen_on_cuda(algorithm, A.shape[-1]))
    return A.new_empty(A.shape), _aux(A, chosen(algorithm, A))


def _fwd_cpu(A: Tensor, inverse: bool, algorithm: str) -> tuple[Tensor, Tensor]:
    A = A.contiguous()
    *batch, d, _ = A.shape
    algorithm = chosen(algorithm, A)
    if algorithm not in KERNELS:
        return reference.sqrtm_fwd(A, inverse, algorithm)
    S, aux = torch.empty_like(A), _aux(A, algorithm)
    if A.numel() == 0:
        return S, aux
    problems, code, kind, threads = _library.product(batch), _library.dtype_code(A), KERNELS[algorithm], _threads()
    size = native.sqrtm_workspace(code, d, kind, threads, False)
    scratch = _library.workspace(size + problems)  # the work, then a mark for each matrix that is left
    place = scratch.data_ptr()
    if native.sqrtm_fwd(
        code, A.data_ptr(), S.data_ptr(), aux.data_ptr(), place + size, place, problems, d, inverse, kind, threads
    ):
        rest = scratch[size : size + problems].nonzero().squeeze(-1)
        S.view(-1, d, d)[rest] = reference.sqrtm_fwd(A.view(-1, d, d)[rest], inverse, "eigh")[0]
        _mark_singular(aux, rest, algorithm)
    return S, aux


def _mark_singular(aux: Tensor, matrices: Tensor, algorithm: str) -> None:
    """Make the backward leave these matrices of the batch, too."""
    if algorithm in ("jacobi", "tridiagonal"):
        roots = aux.view(-1, *aux.shape[-2:])[:, -1]  # (B, d), a view
        roots[matrices] = 0
        roots[matrices, 0] = 1 if algorithm == "jacobi" else torch.inf
    else:
        aux.view(-1, 2)[matrices] = torch.tensor([1.0, 0.0], dtype=aux.dtype)


def _bwd_fake(A: Tensor, S: Tensor, aux: Tensor, grad: Tensor, inverse: bool, algorithm: str) -> Tensor:
    return A.new_empty(A.shape)


def _bwd_cpu(A: Tensor, S: Tensor, aux: Tensor, grad: Tensor, inverse: bool, algorithm: str) -> Tensor:
    A, S, aux, grad = A.contiguous(), S.contiguous(), aux.contiguous(), grad.contiguous()
    *batch, d, _ = A.shape
    algorithm = chosen(algorithm, A)
    if algorithm not in KERNELS:
        return reference.sqrtm_bwd(A, S, aux, grad, inverse, algorithm)
    grad_A = torch.empty_like(A)
    if A.numel() == 0:
        return grad_A
    problems, code, kind, threads = _library.product(batch), _library.dtype_code(A), KERNELS[algorithm], _threads()
    size = native.sqrtm_workspace(code, d, kind, threads, True)
    scratch = _library.workspace(size + problems)
    place = scratch.data_ptr()
    if native.sqrtm_bwd(
        code, S.data_ptr(), aux.data_ptr(), grad.data_ptr(), grad_A.data_ptr(), place + size, place, problems, d,
        inverse, kind, threads,
    ):  # fmt: skip
        rest = scratch[size : size + problems].nonzero().squeeze(-1)
        A, S, grad = (operand.view(-1, d, d)[rest] for operand in (A, S, grad))
        grad_A.view(-1, d, d)[rest] = reference.sqrtm_bwd(A, S, aux, grad, inverse, "polar")
    return grad_A


def _fwd_cuda(A: Tensor, inverse: bool, algorithm: str) -> tuple[Tensor, Tensor]:
    A = A.contiguous()
    algorithm = chosen_on_cuda(algorithm, A.shape[-1])
    if algorithm not in KERNELS:
        return reference.sqrtm_fwd(A, inverse, algorithm)
    S, aux = A.new_empty(A.shape), _aux(A, algorithm)
    if A.numel():
        _launch("fwd", algorithm, inverse, A, S, aux)
    return S, aux


def _bwd_cuda(A: Tensor, S: Tensor, aux: Tensor, grad: Tensor, inverse: bool, algorithm: str) -> Tensor:
    A, S, aux, grad = (operand.contiguous() for operand in (A, S, aux, grad))
    algorithm = chosen_on_cuda(algorithm, A.shape[-1])
    if algorithm not in KERNELS:
        return reference.sqrtm_bwd(A, S, aux, grad, inverse, algorithm)
    grad_A = A.new_empty(A.shape)
    if A.numel():
        _launch("bwd", algorithm, inverse, A, S, aux, grad, grad_A)
    return grad_A


def _launch(direction: str, algorithm: str, inverse: bool, *tensors: Tensor) -> None:
    A, *_ = tensors
    *batch, d, _ = A.shape
    code, sizes = _library.dtype_code(A), (_library.product(batch), d, inverse)
    addresses = [t.data_ptr() for t in tensors] + [0] * (5 - len(tensors))
    workspace = 0
    if algorithm == "polar":
        call = (*addresses, 0, *sizes)
        needed = _library.cuda.sqrtm_workspace(code, call, direction == "bwd", _library.place(A))
        scratch = _library.cuda_workspace(A, needed)
        workspace = scratch.data_ptr()
    _library.launch("sqrtm", A, f"sqrtm_{direction}", code, (*addresses, workspace, *sizes))


def _threads() -> int:
    return torch.get_num_threads()


def _fwd_fake_triton(A: Tensor, inverse: bool, algorithm: str) -> tuple[Tensor, Tensor]:
    """As the reference allocates, which its adjoint can go on from; of larger ones two bounds."""
    from ..triton_kernels.sqrtm import by_products

    *batch, d, _ = A.shape
    if by_products(algorithm, d):
        return A.new_empty(A.shape), A.new_empty((*batch, 2), dtype=torch.float64)
    shape = (*batch, d + 2, d) if algorithm in ("auto", "jacobi", "eigh") else (0,)
    return A.new_empty(A.shape), A.new_empty(shape, dtype=torch.float64)


_library.register(
    "sqrtm_fwd(Tensor A, bool inverse, str algorithm) -> (Tensor, Tensor)",
    _fwd_fake,
    _fwd_cpu,
    cuda=_fwd_cuda,
    triton="sqrtm:sqrtm_fwd",
    triton_fake=_fwd_fake_triton,
)
_library.register(
    "sqrtm_bwd(Tensor A, Tensor S, Tensor aux, Tensor grad, bool inverse, str algorithm) -> Tensor",
    _bwd_fake,
    _bwd_cpu,
    cuda=_bwd_cuda,
    triton="sqrtm:sqrtm_bwd",
)
