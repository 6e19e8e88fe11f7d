"""Every number of the law, the claim and the planner that the documents state, in one file.

python benchmarks/law.py    # about a minute of one core
"""

import argparse
import time
from typing import Any

from record import write
from threadpoolctl import threadpool_limits

from parscale.law.claim import claim
from parscale.law.fit import Law, fit
from parscale.law.planner import plan
from parscale.law.report import judge, predictions
from parscale.law.runs import CORPORA, paper

PLANS: dict[str, dict[str, Any]] = {
    "RTX 4090, one request": {"memory": "6GiB", "latency": "40ms", "hardware": "rtx4090", "dtypes": ("bf16",)},
    "L4, 16 requests of 1024 tokens": {"memory": "24GB", "latency": "40ms", "hardware": "l4"},
}


def timing(corpus: str, repeats: int) -> dict[str, Any]:
    """Seconds of the fit alone on one core: of its own work, and by the clock of a machine that others use too."""
    runs, work, clock = paper(corpus), [], []
    with threadpool_limits(limits=1):
        for _ in range(repeats):
            began = time.process_time(), time.perf_counter()
            fit(runs)
            work.append(time.process_time() - began[0])
            clock.append(time.perf_counter() - began[1])
    return {"what": "timing", "corpus": corpus, "cpu_s": sorted(work), "clock_s": sorted(clock)}


def planned(name: str, law: Law) -> dict[str, Any]:
    from parscale.cost.model import Workload

    work = Workload(batch=16, input=1024) if "16 requests" in name else Workload()
    result = plan(law=law, workload=work, **PLANS[name])
    kept = {"best": result.best, "dense": result.dense, "equal_dense": result.equal_dense, "sentence": result.sentence}
    return {"what": "plan", "case": name, "asked": PLANS[name] | {"batch": work.batch, "in": work.input}} | kept


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--bootstrap", type=int, default=400)
    arguments.add_argument("--repeats", type=int, default=3, help="of the timing")
    options = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for corpus in CORPORA:
        law = fit(paper(corpus))
        rows.append({"what": "fit", "corpus": corpus} | judge(law, options.bootstrap, seed=0, rivals=True))
        worth = predictions(law, (1.6e9,), (1, 2, 4, 8), None)
        rows.append({"what": "equivalent", "corpus": corpus, "rows": worth})
        rows.append(timing(corpus, options.repeats))
    rows.append({"what": "claim"} | claim())
    stack = fit(paper("stack"))
    rows += [planned(name, stack) for name in PLANS]
    print(write("law", vars(options), rows))


if __name__ == "__main__":
    main()
