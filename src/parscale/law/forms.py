"""The forms of law that runs are fitted with: the paper's (section 3) and its rivals, with their gradients.

Every form is L = E + (A / (n·g))^α·h: n = N/1e9 parameters, g what P does to the parameters, h what P does to the
reducible loss. Coefficients are fitted as (E, ln A, α, …): ln A keeps the valley that E, A and α share straight.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from parscale.errors import InputError
from parscale.law.runs import Runs

BILLION = 1e9
SMALL = 1e-8
"""The paper's lower bound for every coefficient: k of a law without streams ends there, not at 0."""


@dataclass(frozen=True)
class Form:
    """One form of law.

    `coefficients`: names in order, always E, A, alpha first. `starts`: for each, the values the multi-start crosses
    (A's are logarithms). `bounds`: the same for the optimiser. `curve(theta, runs)` gives the loss, shape (runs,), and
    its gradient, shape (coefficients, runs).
    """

    name: str
    formula: str
    coefficients: tuple[str, ...]
    starts: tuple[tuple[float, ...], ...]
    bounds: tuple[tuple[float | None, float | None], ...]
    curve: Callable[[np.ndarray, Runs], tuple[np.ndarray, np.ndarray]]

    @property
    def needs_streams(self) -> bool:
        return self.name != "chinchilla"

    @property
    def needs_tokens(self) -> bool:
        return "B" in self.coefficients


def form(name: str) -> Form:
    """The form of this name; InputError lists the known ones."""
    if name not in FORMS:
        raise InputError(f"form {name!r} is not known: choose one of {', '.join(FORMS)}")
    return FORMS[name]


def _power_law(theta: np.ndarray, runs: Runs, log_gain: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """r = (A/(n·g))^α given ln g, shape (runs,), and u = ln(A/(n·g)): what all gradients are made of."""
    log_a, alpha = theta[1], theta[2]
    u = log_a - np.log(runs.params / BILLION) - log_gain
    return np.exp(np.clip(alpha * u, -300, 300)), u  # the clip keeps a wild start finite; no fit ends there


def _paper(theta: np.ndarray, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    log_p, alpha, k = np.log(runs.streams), theta[2], theta[3]
    gain = 1 + k * log_p
    r, u = _power_law(theta, runs, np.log(gain))
    return theta[0] + r, np.stack([np.ones_like(r), alpha * r, r * u, -alpha * r * log_p / gain])


def _outside(theta: np.ndarray, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    log_p, alpha, k = np.log(runs.streams), theta[2], theta[3]
    r, u = _power_law(theta, runs)
    gain = 1 + k * log_p
    h = r / gain
    return theta[0] + h, np.stack([np.ones_like(r), alpha * h, h * u, -h * log_p / gain])


def _power(theta: np.ndarray, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    log_p, alpha, phi = np.log(runs.streams), theta[2], theta[3]
    r, u = _power_law(theta, runs, phi * log_p)
    return theta[0] + r, np.stack([np.ones_like(r), alpha * r, r * u, -alpha * r * log_p])


def _saturating(theta: np.ndarray, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    alpha, rho = theta[2], theta[3]
    r, u = _power_law(theta, runs)
    h = rho + (1 - rho) / runs.streams
    return theta[0] + r * h, np.stack([np.ones_like(r), alpha * r * h, r * h * u, r * (1 - 1 / runs.streams)])


def _growing(theta: np.ndarray, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    log_p, alpha, k, gamma = np.log(runs.streams), theta[2], theta[3], theta[4]
    log_n = np.log(runs.params / BILLION)
    k_of_n = k * np.exp(np.clip(gamma * log_n, -300, 300))
    gain = 1 + k_of_n * log_p
    r, u = _power_law(theta, runs, np.log(gain))
    by_gain = -alpha * r * log_p / gain
    gradient = [np.ones_like(r), alpha * r, r * u, by_gain * k_of_n / k, by_gain * k_of_n * log_n]
    return theta[0] + r, np.stack(gradient)


def _chinchilla(theta: np.ndarray, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    r, u = _power_law(theta, runs)
    return theta[0] + r, np.stack([np.ones_like(r), theta[2] * r, r * u])


def _data(theta: np.ndarray, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    assert runs.tokens is not None
    loss, gradient = _paper(theta[:4], runs)
    log_b, beta = theta[4], theta[5]
    v = log_b - np.log(runs.tokens / BILLION)
    s = np.exp(np.clip(beta * v, -300, 300))
    return loss + s, np.concatenate([gradient, np.stack([beta * s, s * v])])


# The paper's 300 starts: 3 × 5 × 5 × 4 over E, ln A, α, k.
_STARTS = (
    tuple(np.exp([-1.0, -0.5, 0.0]).tolist()),
    (-4.0, -2.0, 0.0, 2.0, 4.0),
    (0.0, 0.5, 1.0, 1.5, 2.0),
    (0.2, 0.4, 0.6, 0.8),
)
_BOUNDS = ((SMALL, None), (None, None), (SMALL, None), (SMALL, None))
_BASE = ("E", "A", "alpha")

FORMS = {
    law.name: law
    for law in (
        Form("paper", "E + (A·1e9/(N·(k·ln P + 1)))^α", (*_BASE, "k"), _STARTS, _BOUNDS, _paper),
        Form("outside", "E + (A·1e9/N)^α/(k·ln P + 1)", (*_BASE, "k"), _STARTS, _BOUNDS, _outside),
        Form("power", "E + (A·1e9/(N·P^φ))^α", (*_BASE, "phi"), _STARTS, _BOUNDS, _power),
        Form(
            "saturating",
            "E + (A·1e9/N)^α·(ρ + (1 - ρ)/P)",
            (*_BASE, "rho"),
            (*_STARTS[:3], (0.5, 0.7, 0.9, 0.97)),
            (*_BOUNDS[:3], (0.0, 1.0)),
            _saturating,
        ),
        Form(
            "growing",
            "E + (A·1e9/(N·(k·(N/1e9)^γ·ln P + 1)))^α",
            (*_BASE, "k", "gamma"),
            (*_STARTS, (0.0,)),
            (*_BOUNDS, (-5.0, 5.0)),
            _growing,
        ),
        Form("chinchilla", "E + (A·1e9/N)^α", _BASE, _STARTS[:3], _BOUNDS[:3], _chinchilla),
        Form(
            "data",
            "E + (A·1e9/(N·(k·ln P + 1)))^α + (B·1e9/D)^β",
            (*_BASE, "k", "B", "beta"),
            (_STARTS[0], (-4.0, 0.0, 4.0), (0.2, 1.0), (0.2, 0.6), (-4.0, 0.0), (0.2, 1.0)),
            (*_BOUNDS, (None, None), (SMALL, None)),
            _data,
        ),
    )
}
