"""The verbs of the command line that ask the law: `law fit | predict | equivalent | claim`, and `plan`.

Imports stand inside the verbs.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from parscale.arguments import later
from parscale.errors import InputError


def law_fit(
    runs: Annotated[Path | None, tyro.conf.Positional] = None,
    paper: Literal["stack", "pile"] | None = None,
    form: Literal["paper", "outside", "power", "saturating", "growing", "chinchilla", "data"] = "paper",
    rivals: bool = True,
    bootstrap: int = 400,
    seed: int = 0,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Fit L(N, P) = E + (A·1e9/(N·(k·ln P + 1)))^α, with intervals, residuals, held-out errors and rival forms.

    Args:
        runs: CSV with the columns params (non-embedding, those of the streams included), streams, loss; optional
            tokens, seed, size.
        paper: instead of a CSV, the paper's own 24 losses on this corpus.
        form: of law to fit.
        rivals: compare all forms by cross-validation.
        bootstrap: refits for the 95 % intervals.
        seed: of the bootstrap.
        plot: write loss against N, contours and residuals to this .png, .svg or .pdf.
        json: print JSON instead of tables.
    """
    from parscale.law.report import report_fit

    report_fit(_law_source(runs, paper), form, bootstrap, seed, rivals, plot, json)


def law_predict(
    params: tuple[float, ...],
    streams: tuple[int, ...] = (1, 2, 4, 8),
    law: str = "stack",
    tokens: float | None = None,
    json: bool = False,
) -> None:
    """The loss that a law predicts for every N and P asked for, marked where it is extrapolated.

    Args:
        params: non-embedding parameters, e.g. 1.6e9.
        streams: P.
        law: "stack" or "pile", fitted to the paper's losses, or a CSV of runs.
        tokens: training tokens; a CSV with a tokens column is then fitted with the data term.
        json: print JSON instead of a table.
    """
    from parscale.law.report import print_predictions

    print_predictions(law, params, streams, tokens, json, ("params", "streams", "loss", "extrapolated"))


def law_equivalent(
    params: tuple[float, ...],
    streams: tuple[int, ...] = (2, 4, 8),
    law: str = "stack",
    tokens: float | None = None,
    json: bool = False,
) -> None:
    """Which dense N has the loss of (N, P), and φ of N·P^φ, for comparison with looped models.

    Args:
        params: non-embedding parameters, e.g. 1.6e9.
        streams: P.
        law: "stack" or "pile", fitted to the paper's losses, or a CSV of runs.
        tokens: training tokens; a CSV with a tokens column is then fitted with the data term.
        json: print JSON instead of a table.
    """
    from parscale.law.report import print_predictions

    columns = ("params", "streams", "loss", "dense_params", "ratio", "exponent", "extrapolated")
    print_predictions(law, params, streams, tokens, json, columns)


def law_claim(json: bool = False, plot: Path | None = None) -> None:
    """Derive the paper's "22x less memory, 6x less latency" from its losses, with every assumption and the variants.

    Args:
        json: print JSON (memory_ratio, latency_ratio, assumptions, variants) instead of text.
        plot: write the figure to this .png, .svg or .pdf.
    """
    from parscale.law.claim import report_claim

    report_claim(json, plot)


LawTask = Annotated[
    Annotated[Any, tyro.conf.subcommand("fit", constructor=later(law_fit))]
    | Annotated[Any, tyro.conf.subcommand("predict", constructor=later(law_predict))]
    | Annotated[Any, tyro.conf.subcommand("equivalent", constructor=later(law_equivalent))]
    | Annotated[Any, tyro.conf.subcommand("claim", constructor=later(law_claim))],
    tyro.conf.arg(name=""),
]


def law(task: LawTask) -> None:
    """The parallel scaling law: fit it to runs, predict with it, and check what the paper claims from it."""
    task()


def _law_source(runs: Path | None, paper: str | None) -> str:
    if (runs is None) == (paper is None):
        raise InputError("give either a CSV of runs or --paper stack|pile")
    return str(paper or runs)


def plan(
    memory: str | None = None,
    latency: str | None = None,
    hardware: str = "a100-80g",
    law: str = "stack",
    streams: tuple[int, ...] = (1, 2, 4, 8),
    dtype: tuple[Literal["fp32", "bf16", "fp16", "int8", "int4"], ...] = ("bf16", "int8", "int4"),
    batch: int = 1,
    in_tokens: Annotated[int, tyro.conf.arg(name="in")] = 64,
    out_tokens: Annotated[int, tyro.conf.arg(name="out")] = 64,
    train_flops: float | None = None,
    tokens: float | None = None,
    kv: Literal["own", "shared"] = "own",
    accounting: Literal["released", "counted"] = "released",
    plot: Path | None = None,
    page: Path | None = None,
    json: bool = False,
) -> None:
    """Which N and P? The least loss under budgets of memory, latency and training, and how sure the law is.

    Args:
        memory: at most so much, e.g. 6GiB; by default what the hardware has.
        latency: at most so long for one output token, e.g. 40ms; by default any.
        hardware: a100-80g, h100, h200, rtx4090, l4, m3-max, cpu, or a JSON file with flops, bandwidth, memory.
        law: stack or pile, fitted to the paper's losses, or a CSV of your runs.
        streams: the P to choose among.
        dtype: the weights' types to choose among. The law is about 16 bits.
        batch: requests at once.
        in_tokens: prompt tokens.
        out_tokens: tokens generated.
        train_flops: at most so much training, with streams from the first token.
        tokens: trained on; by default 42e9, the paper's.
        kv: every stream has its own keys and values, or one stream's are shared by all.
        accounting: of costs: released is the paper's analysis; counted is what this library's forward does.
        plot: draw the frontier to this .png, .svg or .pdf.
        page: write a page with sliders to this .html, which needs no network; no plan is printed.
        json: print JSON instead of tables.
    """
    if page is not None:
        from parscale.law.page import write_page

        print(write_page(page))
        return
    from parscale.cost.model import Workload
    from parscale.law.plan_report import report_plan

    workload = Workload(batch=batch, input=in_tokens, output=out_tokens, kv=kv, accounting=accounting)
    choices = {"hardware": hardware, "law": law, "streams": streams, "dtypes": dtype, "workload": workload}
    report_plan(json, plot, memory=memory, latency=latency, train_flops=train_flops, tokens=tokens, **choices)
