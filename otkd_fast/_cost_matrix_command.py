"""``python -m otkd_fast cost-matrix FEATURES -o FILE``: the cost between categories for WKD-L, file to file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .losses.wkd_cost import METHODS, wkd_cost

SUFFIXES = (".npz", ".npy", ".pt", ".pth")

DESCRIPTION = """\
Make the cost matrix between categories that WKD-L (otkd_fast.losses.WKDLogit) needs, once for each teacher.

Run the teacher over the training set (test transforms, eval mode), keep its features and the labels in one file,
and give that file here:

    np.savez("features.npz", features=features, labels=labels)   # (N, d) or (N, d, h, w), and (N,)
    python -m otkd_fast cost-matrix features.npz -o cost.pt

    cost = torch.load("cost.pt")                                 # (C, C)
    distil = otkd_fast.losses.WKDLogit(cost=cost, temperature=8.0, gamma=600.0)

From classifier weights alone:

    python -m otkd_fast cost-matrix teacher.pt --features-key fc.weight --method cosine -o cost.pt
"""

EPILOG = """\
Methods: 'cka' is the published one (linear CKA between the features of two classes; the classes are cut to the size of
the smallest). 'rbf_cka' has a Gaussian kernel. 'cosine' compares classifier weights (no labels) or class means.
The entries are 1 - exp(-kappa d) with d = 1 - similarity; --kappa 0 writes d itself, as in the released files.
Exit code: 0, or 2 with a sentence on standard error if the input cannot be used.
"""


class _Unusable(Exception):
    """An input that cannot be used, in a sentence for the user."""


def main(arguments: list[str]) -> int:
    """Read, compute, write; 0, or 2 if the input cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        _check_output(options.output)
        features, labels = _read(options)
        device = _device(options.device)
        cost = wkd_cost(
            features.to(device), None if labels is None else labels.to(device), method=options.method,
            kappa=options.kappa, sigma=options.sigma, classes=options.classes, max_per_class=options.max_per_class,
            progress=None if options.quiet else _Bar(),
        ).cpu()  # fmt: skip
        _write(cost, options.output)
    except (_Unusable, ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"cost-matrix: {error}", file=sys.stderr)
        return 2
    if not options.quiet:
        print(f"{options.output}: {_summary(cost)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m otkd_fast cost-matrix", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("features", type=Path, metavar="FEATURES", help="file with the features: .npz, .npy, .pt or .pth")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="file to write: .npy, .npz (key cost) or .pt")
    add("--labels", type=Path, metavar="FILE", help="file with the labels, if they are not in FEATURES")
    add("--features-key", default="features", metavar="KEY", help="name in an .npz or .pt (default: %(default)s)")
    add("--labels-key", default="labels", metavar="KEY", help="name in an .npz or .pt (default: %(default)s)")
    add("--method", choices=METHODS, default="cka", help="how categories are compared (default: %(default)s)")
    add("--kappa", type=float, default=1.0, help="sharpening, 0: none (default: %(default)s; ResNet-50: 2)")
    add("--sigma", type=float, default=1.0, help="bandwidth of rbf_cka (default: %(default)s)")
    add("--classes", type=int, help="number of classes (default: the largest label + 1)")
    add("--max-per-class", type=int, metavar="N", help="use the first N rows of each class only")
    add("--device", default="cpu", help="where to compute (default: %(default)s)")
    add("-q", "--quiet", action="store_true", help="no progress bar, no summary")
    return parser


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts
        raise _Unusable(f"--device: expected a device that this torch has, got {name!r} ({error})") from error
    return device


def _check_output(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise _Unusable(f"expected an output file ending in {', '.join(SUFFIXES)}, got {path}")
    if not path.parent.is_dir():
        raise _Unusable(f"the folder of the output file does not exist: {path.parent}")


def _read(options: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    """Features and labels; the labels are None where there are none, which suits 'cosine' only."""
    contents = _load(options.features)
    features = _pick(contents, options.features_key, options.features)
    if options.labels is not None:
        labels = _pick(_load(options.labels), options.labels_key, options.labels)
    elif isinstance(contents, dict) and options.labels_key in contents:
        labels = _pick(contents, options.labels_key, options.features)
    else:
        labels = None
    if labels is None and options.method != "cosine":
        raise _Unusable(
            f"method {options.method} needs labels: put them into {options.features} as '{options.labels_key}', "
            "or give --labels FILE"
        )
    return features, labels


def _load(path: Path) -> Tensor | dict:
    """A tensor, or a dict of arrays and tensors."""
    if path.suffix not in SUFFIXES:
        raise _Unusable(f"expected a file ending in {', '.join(SUFFIXES)}, got {path}")
    if not path.is_file():
        raise _Unusable(f"no such file: {path}")
    try:
        if path.suffix in (".pt", ".pth"):
            contents = torch.load(path, map_location="cpu", weights_only=True)
        else:
            contents = np.load(path, allow_pickle=False)
            contents = dict(contents) if path.suffix == ".npz" else contents
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _Unusable(f"{path} cannot be read: {reason}") from error
    return contents


def _pick(contents, key: str, path: Path) -> Tensor:
    if isinstance(contents, dict):
        if key not in contents:
            names = ", ".join(map(str, contents)) or "nothing"
            raise _Unusable(f"{path} has no '{key}', it has: {names}")
        contents = contents[key]
    if isinstance(contents, Tensor):
        return contents.detach()
    if not isinstance(contents, np.ndarray) or contents.dtype.kind not in "fiu":
        kind = contents.dtype if isinstance(contents, np.ndarray) else type(contents).__name__
        raise _Unusable(f"{path}: expected an array of numbers, got {kind}")
    if contents.dtype.kind == "u" and contents.dtype != np.uint8:
        contents = contents.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(contents))


def _write(cost: Tensor, path: Path) -> None:
    if path.suffix == ".npy":
        np.save(path, cost.numpy())
    elif path.suffix == ".npz":
        np.savez(path, cost=cost.numpy())
    else:
        torch.save(cost, path)


def _summary(cost: Tensor) -> str:
    off = cost[~torch.eye(cost.shape[0], dtype=torch.bool)]
    return (
        f"cost between {cost.shape[0]} categories, off the diagonal from {off.min():.4f} to {off.max():.4f}, "
        f"median {off.median():.4f}"
    )


class _Bar:
    """Progress on standard error: a bar on a terminal, else nothing but every tenth."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.shown = -1

    def __call__(self, done: int, total: int) -> None:
        terminal = sys.stderr.isatty()
        share = done * (100 if terminal else 10) // total
        if share == self.shown:
            return
        self.shown = share
        elapsed = time.monotonic() - self.start
        left = elapsed / done * (total - done)
        text = f"{done * 100 // total:3d} %  {elapsed:.0f} s, {left:.0f} s left"
        if terminal:
            width = done * 40 // total
            end = "\n" if done == total else ""
            print(f"\r[{'#' * width}{'.' * (40 - width)}] {text}  ", end=end, file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
