"""The command line: one function a verb, each calling one function of the library.

Imports stand inside the verbs, so that each loads only what it needs.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from parscale.errors import InputError

Model = Annotated[str, tyro.conf.Positional]


def demo(
    out: Path = Path("demo-out"),
    data: tuple[str, ...] = ("stdlib",),
    scale: Literal["auto", "smoke", "cpu", "gpu"] = "auto",
    streams: tuple[int, ...] = (2, 4),
    seed: int = 0,
) -> None:
    """Watch a small model gain from parallel streams on real text, against the control: ten minutes on two CPU cores.

    Args:
        out: folder for the models, demo.json and report.html; it must not hold anything yet.
        data: text: a folder, files, a data set's name, or "stdlib", this Python's own standard library.
        scale: smoke proves the machinery in seconds; cpu; gpu; auto takes what the machine has.
        streams: the P to compare with the control.
        seed: of weights and data order.
    """
    from parscale.experiments.demo import run_demo

    run_demo(out, data=data, scale=scale, streams=streams, seed=seed)


def generate(
    model: Model,
    prompt: Annotated[str, tyro.conf.Positional],
    streams: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Complete a prompt, printing the text as it comes.

    Args:
        model: a folder or a hub name, with or without streams.
        prompt: the text to go on from.
        streams: run this many of the model's streams; by default all.
        max_new_tokens: at most so many tokens more.
        temperature: 0 is greedy; above 0 samples.
        seed: of the sampling.
    """
    from transformers import TextStreamer

    from parscale.generate import complete
    from parscale.load import load_model, load_tokenizer

    loaded, tokenizer = load_model(model), load_tokenizer(model)
    print(prompt, end="", flush=True)
    complete(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        streams=streams,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


def probe(
    model: Model,
    data: tuple[str, ...] = ("stdlib",),
    control: str | None = None,
    sequences: int = 8,
    block_size: int = 256,
    json: bool = False,
) -> None:
    """Do the streams differ, and are they all used? Correlation, weights, losses and a verdict, on held-out text.

    Args:
        model: a folder or a hub name of a model with streams.
        data: text, of which the held-out part is read.
        control: a model to measure the streams' errors against: best, P=1 with a prefix.
        sequences: how many sequences to look at.
        block_size: tokens in each.
        json: print JSON instead of a table.
    """
    from parscale.probe import probe_model

    probe_model(model, data=data, control=control, sequences=sequences, block_size=block_size, as_json=json)


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
    Annotated[Any, tyro.conf.subcommand("fit", constructor=law_fit)]
    | Annotated[Any, tyro.conf.subcommand("predict", constructor=law_predict)]
    | Annotated[Any, tyro.conf.subcommand("equivalent", constructor=law_equivalent)]
    | Annotated[Any, tyro.conf.subcommand("claim", constructor=law_claim)],
    tyro.conf.arg(name=""),
]


def law(task: LawTask) -> None:
    """The parallel scaling law: fit it to runs, predict with it, and check what the paper claims from it."""


def _law_source(runs: Path | None, paper: str | None) -> str:
    if (runs is None) == (paper is None):
        raise InputError("give either a CSV of runs or --paper stack|pile")
    return str(paper or runs)


VERBS: dict[str, Callable[..., Any]] = {"demo": demo, "generate": generate, "probe": probe, "law": law}


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns 0; 2 with one line on stderr when the input is at fault; 130 when interrupted."""
    # transformers' bars and notices are for its own developers; a verb has its own bar and says what matters.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from parscale.train.config import TrainConfig

    def train_verb(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
        from parscale.train.trainer import train

        train(config)

    train_verb.__doc__ = TrainConfig.__doc__
    verbs = {"train": train_verb} | VERBS
    try:
        tyro.extras.subcommand_cli_from_dict(
            verbs, prog="parscale", description="Parallel streams for causal language models.", args=argv
        )
    except (InputError, OSError) as error:
        print(f"parscale: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("parscale: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
