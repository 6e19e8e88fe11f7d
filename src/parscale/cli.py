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


VERBS: dict[str, Callable[..., Any]] = {"demo": demo, "generate": generate, "probe": probe}


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
