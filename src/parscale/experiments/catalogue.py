"""All experiments, in the order of the report."""

from parscale.errors import InputError
from parscale.experiments.claim import Claim
from parscale.experiments.claims import (
    aggregation,
    balance,
    baseline,
    data,
    diversifiers,
    domains,
    dynamic,
    efficiency,
    law,
    lora,
    many_streams,
    moe,
    prefix,
    rates,
    sft,
    sharing,
    smoothing,
    split,
    theory,
    together,
)

MODULES = (
    baseline, aggregation, efficiency, law, many_streams, data, split, moe, smoothing, domains, prefix, dynamic, sft,
    theory, sharing, balance, diversifiers, rates, lora, together,
)  # fmt: skip
CLAIMS: dict[str, Claim] = {module.CLAIM.name: module.CLAIM for module in MODULES}


def claim_named(name: str) -> Claim:
    """The experiment of that name.

    Raises:
        InputError: there is none.
    """
    if name not in CLAIMS:
        raise InputError(f"experiment {name!r} is not known: give one of {', '.join(CLAIMS)}")
    return CLAIMS[name]
