"""The parallel scaling law: fit it, judge it, and use it to choose N and P."""

from parscale.law.compare import compare
from parscale.law.equivalence import equivalence_exponent, equivalent_params
from parscale.law.fit import Law, bootstrap, fit, leave_one_out
from parscale.law.planner import Plan, plan
from parscale.law.runs import paper

__all__ = [
    "Law",
    "Plan",
    "bootstrap",
    "compare",
    "equivalence_exponent",
    "equivalent_params",
    "fit",
    "leave_one_out",
    "paper",
    "plan",
]
