"""What P streams are worth in parameters: the dense model of the same loss, and one exponent that says as much.

N·P^φ is how looped and recurrent models state the worth of a repeated pass; φ lets the two be compared.
"""

import math

from scipy.optimize import root_scalar

from parscale.errors import InputError
from parscale.law.fit import Law

_FACTOR = 1e6  # how far from N the dense model is looked for


def equivalent_params(law: Law, params: float, streams: float, tokens: float | None = None) -> float:
    """Parameters N' of the dense model (P = 1) with the loss of (params, streams): L(N', 1) = L(N, P).

    For the paper's form N' = N·(k·ln P + 1). InputError when no dense model within a factor of 1e6 has that loss.
    """
    if streams < 1:
        raise InputError(f"streams is {streams!r}: at least 1 is needed")
    goal = law.predict(params, streams, tokens)
    return _dense_at(law, goal, params, tokens)


def dense_params_at(law: Law, loss: float, near: float) -> float:
    """Parameters of the dense model whose loss is `loss` nats; `near` is where the search begins."""
    return _dense_at(law, loss, near, None)


def equivalence_exponent(law: Law, params: float, streams: float, tokens: float | None = None) -> float:
    """φ with N' = N·P^φ at this (N, P), dimensionless. 1 would be as good as P times the parameters, 0 worth nothing.

    The paper's form has no constant φ: it falls as P grows. The fit of the form "power" gives one φ for all runs.
    """
    if streams <= 1:
        raise InputError(f"streams is {streams!r}: the exponent compares P > 1 streams with one")
    return math.log(equivalent_params(law, params, streams, tokens) / params) / math.log(streams)


def _dense_at(law: Law, loss: float, near: float, tokens: float | None) -> float:
    def gap(log_n: float) -> float:
        return law.predict(math.exp(log_n), 1, tokens) - loss

    low, high = math.log(near / _FACTOR), math.log(near * _FACTOR)
    if gap(high) > 0 or gap(low) < 0:
        raise InputError(f"loss {loss:.4f} is beyond the law's dense models: its floor is E = {law.E:.4f} nats")
    return math.exp(root_scalar(gap, bracket=(low, high), xtol=1e-12).root)
