"""The cost between categories against the definition of CKA, and the command that makes it."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from otkd_fast.__main__ import main
from otkd_fast.losses import WKDLogit, wkd_cost
from otkd_fast.losses import wkd_cost as function
from otkd_fast.losses.wkd_cost import _aligned, _by_class, _feature_products, _gram_products


def classes_of(counts, d, generator):
    """Features of classes that differ in mean and in scale, in random order."""
    rows = [torch.randn(n, d, generator=generator, dtype=torch.float64) @ torch.randn(
        d, d, generator=generator, dtype=torch.float64) + k for k, n in enumerate(counts)]  # fmt: skip
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat(rows)[order], labels[order]


def cka(x, y):
    """Linear CKA in the feature form, columns centred."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def rbf_cka(x, y, sigma):
    def gram(z):
        squares = torch.tensor([[((p - q) ** 2).sum() for q in z] for p in z], dtype=torch.float64)
        kernel = torch.exp(-squares / (2 * sigma**2 * squares.flatten().median()))
        centre = torch.eye(len(z), dtype=torch.float64) - 1 / len(z)
        return centre @ kernel @ centre

    k, m = gram(x), gram(y)
    return (k * m).sum() / (k.norm() * m.norm())


def definition(features, labels, similarity, kappa):
    groups = [features[labels == k] for k in range(int(labels.max()) + 1)]
    m = min(map(len, groups))
    c = torch.zeros(len(groups), len(groups), dtype=torch.float64)
    for i, x in enumerate(groups):
        for j, y in enumerate(groups):
            d = 0.0 if i == j else 1 - similarity(x[:m], y[:m])
            c[i, j] = 1 - np.exp(-kappa * float(d)) if kappa else d
    return c


@pytest.mark.parametrize(("counts", "d"), [((5, 7, 6), 12), ((30, 25, 41, 28), 6)])  # fewer, more rows than features
@pytest.mark.parametrize("kappa", [0.0, 1.0, 2.0])
def test_linear_cka(counts, d, kappa, generator):
    features, labels = classes_of(counts, d, generator)
    actual = wkd_cost(features, labels, kappa=kappa)
    torch.testing.assert_close(actual, definition(features, labels, cka, kappa), rtol=1e-9, atol=1e-12)
    assert torch.equal(actual, actual.T) and not actual.diagonal().any()
    assert wkd_cost(features.float(), labels, kappa=kappa).dtype == torch.float32


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_rbf_cka(sigma, generator):
    features, labels = classes_of((6, 8, 7), 4, generator)
    actual = wkd_cost(features, labels, method="rbf_cka", sigma=sigma)
    expected = definition(features, labels, lambda x, y: rbf_cka(x, y, sigma), 1.0)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_the_two_forms_of_linear_cka_and_their_blocks(generator, monkeypatch):
    features, labels = classes_of((9, 8, 11, 10, 9), 7, generator)
    x = _aligned(features, _by_class(features, labels, None, 2), None)
    expected = _feature_products(x, None)
    torch.testing.assert_close(_gram_products(x, None), expected, rtol=1e-12, atol=0.0)
    monkeypatch.setattr(sys.modules[function.__module__], "_BLOCK", 100)
    torch.testing.assert_close(_gram_products(x, None), expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(_feature_products(x, None), expected, rtol=1e-12, atol=0.0)
    blocks = wkd_cost(features, labels, method="rbf_cka")
    monkeypatch.undo()
    torch.testing.assert_close(wkd_cost(features, labels, method="rbf_cka"), blocks, rtol=1e-12, atol=0.0)


def test_positions_are_rows(generator):
    maps = torch.randn(12, 3, 2, 2, generator=generator, dtype=torch.float64)
    labels = torch.arange(12) % 2
    rows = torch.stack([maps[n, :, i, j] for n in range(12) for i in range(2) for j in range(2)])
    expected = wkd_cost(rows, labels.repeat_interleave(4))
    torch.testing.assert_close(wkd_cost(maps, labels), expected, rtol=1e-12, atol=0.0)


def test_only_so_many_rows_of_a_class(generator):
    features, labels = classes_of((20, 20, 20), 4, generator)
    kept = torch.cat([torch.nonzero(labels == k)[:9, 0] for k in range(3)])
    torch.testing.assert_close(wkd_cost(features, labels, max_per_class=9), wkd_cost(features[kept], labels[kept]))


def test_cosine_of_weights_and_of_class_means(generator):
    weights = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    unit = weights / weights.norm(dim=1, keepdim=True)
    distance = (1 - unit @ unit.T).fill_diagonal_(0)
    torch.testing.assert_close(wkd_cost(weights, method="cosine", kappa=0.0), distance, rtol=0.0, atol=1e-12)
    features = weights.repeat_interleave(3, 0) + torch.tensor([-1.0, 0.0, 1.0]).repeat(4)[:, None]
    labels = torch.arange(4).repeat_interleave(3)
    torch.testing.assert_close(wkd_cost(features, labels, method="cosine", kappa=0.0), distance, rtol=0.0, atol=1e-12)


def test_a_class_that_does_not_vary_is_far_from_all(generator):
    features, labels = classes_of((6, 6, 6), 3, generator)
    features[labels == 1] = 2.0
    distance = wkd_cost(features, labels, kappa=0.0)
    assert distance[0, 1] == 1.0 and distance[1, 2] == 1.0 and 0 < distance[0, 2] < 1 and distance[1, 1] == 0.0


F, Y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
WRONG = {
    "features no tensor": (([1.0], Y), {}, TypeError, "features"),
    "integer features": ((F.long(), Y), {}, TypeError, "features"),
    "no features": ((F[:, :0], Y), {}, ValueError, "features"),
    "NaN": ((F * torch.nan, Y), {}, ValueError, "features"),
    "labels missing": ((F,), {}, ValueError, "labels"),
    "float labels": ((F, Y.float()), {}, TypeError, "labels"),
    "too few labels": ((F, Y[:5]), {}, ValueError, "labels"),
    "negative label": ((F, Y - 1), {}, ValueError, "labels"),
    "label too large": ((F, Y), {"classes": 2}, ValueError, "labels"),
    "class absent": ((F, Y), {"classes": 4}, ValueError, "labels.*class 3"),
    "singleton class": ((F[:5], Y[:5]), {}, ValueError, "labels.*class 2"),
    "one class": ((F, Y * 0), {}, ValueError, "at least two classes"),
    "unknown method": ((F, Y), {"method": "cca"}, ValueError, "method"),
    "kappa": ((F, Y), {"kappa": -1.0}, ValueError, "kappa"),
    "sigma": ((F, Y), {"sigma": 0.0, "method": "rbf_cka"}, ValueError, "sigma"),
    "max_per_class": ((F, Y), {"max_per_class": 1}, ValueError, "max_per_class"),
    "weights of rank 3": ((F[None],), {"method": "cosine"}, ValueError, "features"),
    "a weight of zeros": ((F * 0,), {"method": "cosine"}, ValueError, "features"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input(case):
    arguments, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        wkd_cost(*arguments, **options)


def run(*arguments):
    return main(["cost-matrix", *map(str, arguments)])


@pytest.mark.parametrize("output", ["cost.pt", "cost.npy", "cost.npz"])
def test_command(tmp_path, generator, output, capsys):
    features, labels = classes_of((5, 7, 6), 4, generator)
    np.savez(tmp_path / "features.npz", features=features.float().numpy(), labels=labels.numpy())
    assert run(tmp_path / "features.npz", "-o", tmp_path / output, "--kappa", 2) == 0
    written = tmp_path / output
    cost = torch.load(written) if output == "cost.pt" else np.load(written)
    cost = torch.as_tensor(cost["cost"] if output == "cost.npz" else cost)
    assert torch.equal(cost, wkd_cost(features.float(), labels, kappa=2.0))
    printed = capsys.readouterr()
    assert "3 categories" in printed.out and "100 %" in printed.err
    logits = torch.randn(2, 3)
    assert WKDLogit(cost=cost)(logits, logits, torch.tensor([0, 2])).isfinite()


def test_command_reads_the_other_formats(tmp_path, generator):
    features, labels = classes_of((5, 7, 6), 4, generator)
    expected = wkd_cost(features, labels)
    torch.save({"x": features, "y": labels}, tmp_path / "both.pt")
    np.save(tmp_path / "features.npy", features.numpy())
    np.save(tmp_path / "labels.npy", labels.numpy().astype(np.uint16))
    torch.save(features, tmp_path / "alone.pt")
    out = tmp_path / "cost.pt"
    for arguments in (
        ("both.pt", "--features-key", "x", "--labels-key", "y"),
        ("features.npy", "--labels", tmp_path / "labels.npy"),
        ("alone.pt", "--labels", tmp_path / "labels.npy"),
    ):
        assert run(tmp_path / arguments[0], *arguments[1:], "-o", out, "-q") == 0
        assert torch.equal(torch.load(out), expected)
    torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / "teacher.pt")
    assert run(tmp_path / "teacher.pt", "--features-key", "weight", "--method", "cosine", "-o", out, "-q") == 0
    assert torch.load(out).shape == (3, 3)


def test_command_says_what_is_wrong(tmp_path, generator, capsys):
    features, labels = classes_of((5, 7, 6), 4, generator)
    good = tmp_path / "good.npz"
    np.savez(good, features=features.numpy(), labels=labels.numpy())
    np.savez(tmp_path / "bare.npz", features=features.numpy())
    np.savez(tmp_path / "words.npz", features=np.array(["a"]), labels=labels.numpy())
    (tmp_path / "broken.pt").write_bytes(b"no tensor")
    (tmp_path / "features.csv").write_text("1,2")
    np.savez(tmp_path / "short.npz", features=features.numpy(), labels=labels.numpy()[:3])
    out = tmp_path / "cost.pt"
    for arguments, words in (
        ((tmp_path / "absent.npz", "-o", out), "no such file"),
        ((tmp_path / "features.csv", "-o", out), "expected a file ending in"),
        ((tmp_path / "broken.pt", "-o", out), "cannot be read"),
        ((tmp_path / "bare.npz", "-o", out), "needs labels"),
        ((tmp_path / "words.npz", "-o", out), "array of numbers"),
        ((tmp_path / "short.npz", "-o", out), "labels: expected shape"),
        ((good, "-o", out, "--features-key", "x"), "has no 'x', it has: features, labels"),
        ((good, "-o", tmp_path / "cost.txt"), "expected an output file"),
        ((good, "-o", tmp_path / "no" / "cost.pt"), "folder of the output file"),
        ((good, "-o", out, "--kappa", "-1"), "kappa"),
        ((good, "-o", out, "--device", "nowhere"), "--device: expected a device that this torch has, got 'nowhere'"),
        *([] if torch.cuda.is_available() else [((good, "-o", out, "--device", "cuda"), "got 'cuda'")]),
    ):
        assert run(*arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith("cost-matrix: ") and words in message and "Traceback" not in message
    assert not out.exists()


def test_command_as_a_program(tmp_path):
    command = [sys.executable, "-m", "otkd_fast", "cost-matrix"]
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "np.savez" in help_text and "WKDLogit(cost=cost" in help_text and "--kappa" in help_text
    absent = subprocess.run([*command, "no.npz", "-o", "c.pt"], capture_output=True, text=True, cwd=tmp_path)
    assert absent.returncode == 2 and "no such file: no.npz" in absent.stderr
    assert subprocess.run(command, capture_output=True).returncode == 2
