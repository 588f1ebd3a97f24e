"""What the Sinkhorn kernels share: masses, starts, updates, values and errors of one side, in float64.

Potentials are in units of epsilon ln 2: phi = f log2(e) / epsilon, gamma likewise, so that P_ij = 2^(phi_i + gamma_j
- c_ij)
with c = C log2(e) / epsilon. They are float64 whatever the data: a float32 problem takes its exponentials in float32,
of exponents that were formed in float64. -inf stands for what takes no part.
"""

from __future__ import annotations

from ._runtime import constant, jit, tl

LOG2E = constant(1.4426950408889634)
LN2 = constant(0.6931471805599453)
# lanes of a scalings' exponent range within which the kernels iterate on scalings, in bits: float32, float64
RANGE_32, WIDE_32 = constant(60.0), constant(100.0)
RANGE_64, WIDE_64 = constant(480.0), constant(800.0)


@jit
def exp2_of(x, DATA: tl.constexpr):  # noqa: N803
    """2^x in float64, to the accuracy of DATA, the dtype of the costs."""
    return tl.exp2(x.to(DATA)).to(tl.float64)


@jit
def log2_of(x, DATA: tl.constexpr):  # noqa: N803
    return tl.log2(x.to(DATA)).to(tl.float64)


@jit
def load_masses(weights, base, index, size, GIVEN: tl.constexpr):  # noqa: N803
    """Masses of one side in float64, 1 / size where they are not given, 0 beyond `size`."""
    inside = index < size
    if GIVEN:
        return tl.load(weights + base + index, mask=inside, other=0.0).to(tl.float64)
    else:
        return tl.where(inside, 1.0 / (tl.zeros((), tl.float64) + size), 0.0)


@jit
def log_masses(masses, DATA: tl.constexpr):  # noqa: N803
    """log2 of the masses, 0 where there is none."""
    return log2_of(tl.where(masses > 0, masses, 1.0), DATA)


@jit
def start(initial, base, index, size, masses, scale, GIVEN: tl.constexpr):  # noqa: N803
    """The potential that a solve starts from: 0, or the given one where it is finite; -inf where there is no mass."""
    value = tl.zeros_like(masses)
    if GIVEN:
        given = tl.load(initial + base + index, mask=index < size, other=0.0).to(tl.float64)
        value = tl.where((given > float("-inf")) & (given < float("inf")), given * scale, 0.0)
    return tl.where(masses > 0, value, float("-inf"))


@jit
def updated(old, masses, log_mass, sums, exponent, omega, RELAXED: tl.constexpr):  # noqa: N803
    """log_mass - exponent sums, over-relaxed from `old`; -inf where there is no mass or the sum is empty."""
    new = tl.where((masses > 0) & (sums != float("-inf")), log_mass - exponent * sums, float("-inf"))
    if RELAXED:
        mixed = (1.0 - omega) * old + omega * new
        new = tl.where((old == float("-inf")) | (new == float("-inf")), new, mixed)
    return new


@jit
def one_minus_exp(z, DATA: tl.constexpr):  # noqa: N803
    """1 - exp(-z), also of small z, in float64."""
    tail = 1.0 - z / 5.0 * (1.0 - z / 6.0 * (1.0 - z / 7.0 * (1.0 - z / 8.0)))
    series = z * (1.0 - z / 2.0 * (1.0 - z / 3.0 * (1.0 - z / 4.0 * tail)))
    return tl.where(tl.abs(z) < 0.05, series, 1.0 - exp2_of(-z * LOG2E, DATA))


@jit
def side_error(masses, log_mass, potential, sums, drop, DATA: tl.constexpr):  # noqa: N803
    """sum |sums - target| of one side; drop: epsilon / penalty, 0 for a constraint."""
    target = masses
    if drop > 0:
        served = potential > float("-inf")
        relative = tl.where(served, potential - log_mass, 0.0)
        target = tl.where(served, masses * exp2_of(-relative * drop, DATA), 0.0)
    return tl.sum(tl.abs(sums.to(tl.float64) - target))


@jit
def side_value(masses, log_mass, potential, epsilon, drop, DATA: tl.constexpr):  # noqa: N803
    """The part of the dual value that belongs to one side."""
    served = potential > float("-inf")
    relative = tl.where(served, potential - log_mass, 0.0)
    if drop > 0:
        left = tl.where(served, one_minus_exp(relative * drop * LN2, DATA), 1.0)
        value = tl.sum(masses * left) * (epsilon / drop)
    else:
        value = tl.sum(masses * relative) * (epsilon * LN2)
    return value


@jit
def side_gradient(masses, log_mass, potential, sums, other_total, epsilon, drop, DATA: tl.constexpr):  # noqa: N803
    """Of the dual value at fixed costs: by the potential (natural units), and by the masses at a fixed potential."""
    served = potential > float("-inf")
    relative = tl.where(served, potential - log_mass, 0.0)
    if drop > 0:
        factor = exp2_of(-relative * drop, DATA)
        by_mass = epsilon / drop * one_minus_exp(relative * drop * LN2, DATA) - epsilon * factor
        by_mass = tl.where(served, by_mass, epsilon / drop)
        by_mass = tl.where(masses > 0, by_mass + epsilon * other_total, 0.0)
    else:
        factor = tl.zeros_like(relative) + 1.0
        by_mass = epsilon * (relative * LN2 - 1.0 + other_total)
        by_mass = tl.where((masses > 0) & served, by_mass, 0.0)
    by_potential = tl.where(served, masses * factor - sums.to(tl.float64), 0.0)
    return by_potential, by_mass


@jit
def relaxation(omega, previous, error, step):
    """(omega, error to compare the next one with) after iteration `step`, where omega is chosen by observation."""
    if step == 9:
        previous = error
    if (step >= 10) & (step % 10 == 0):
        ratio = tl.where(previous > 0, error / previous, 0.0)
        ratio = tl.where(ratio > 0.9999, 0.9999, ratio)
        best = tl.floor(2048.0 / (1.0 + tl.sqrt(1.0 - ratio)) + 0.5) / 1024.0
        best = tl.where(best > 1.95, 1.95, best)
        kept = tl.where(error > previous, 1.0, omega)
        omega = tl.where(step == 10, best, kept)
        previous = error
    return omega, previous
