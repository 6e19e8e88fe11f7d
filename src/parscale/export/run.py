"""What `parscale export` does: load, fold, write for an engine, and measure what few bits have cost on real text.

Nothing is left behind when it fails.
"""

import logging
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from parscale.errors import InputError
from parscale.export.folded import check_foldable
from parscale.output import print_json
from parscale.utils.files import new_folder

Engine = Literal["onnx", "openvino"]
Weights = Literal["float32", "int8", "int4"]


@dataclass(frozen=True)
class Exported:
    """What was written, and its quality on held-out text: perplexity of the model in float32 and of the written files,
    run by the engine; None where no text was given. `tokens` were predicted for each."""

    folder: Path
    engine: Engine
    weights: Weights
    streams: int
    megabytes: float
    tokens: int | None = None
    perplexity_float32: float | None = None
    perplexity: float | None = None


def export_model(
    name: str | Path,
    out: str | Path,
    *,
    engine: Engine,
    weights: Weights = "float32",
    streams: int | None = None,
    data: tuple[str, ...] = (),
    sequences: int = 8,
    block_size: int = 256,
) -> Exported:
    """Write a model for an engine: its graph, its settings and its tokenizer.

    Args:
        name: a folder or hub name of a model of a family that folds (`folded.FAMILIES`), with or without streams.
        out: folder to write; it must not hold anything yet. It appears, or is filled, when all is written.
        engine: "onnx" for ONNX Runtime GenAI, "openvino" for OpenVINO GenAI.
        weights: of the linear layers and the LM head.
        streams: write this many of the model's streams; by default all. A graph's P is fixed.
        data: text (see `parscale.train.corpus.read_documents`) on whose held-out part both perplexities are measured.
        sequences: how many sequences of it, at most.
        block_size: tokens in each.

    Raises:
        InputError: an argument, a model that cannot be folded, or packages of the engine's extra that are missing.
    """
    from parscale.load import load_model, load_tokenizer

    out = Path(out)
    for argument, value, accepted in (("engine", engine, get_args(Engine)), ("weights", weights, get_args(Weights))):
        if value not in accepted:
            raise InputError(f"{argument}={value!r} is not accepted; give one of {accepted}")
    for argument, value, least in (("sequences", sequences, 1), ("block_size", block_size, 2)):
        if value < least:
            raise InputError(f"{argument}={value} is not accepted; give a number >= {least}")
    with new_folder(out) as folder:
        model, tokenizer = load_model(name, dtype=torch.float32), load_tokenizer(name)
        if streams is not None:
            choose_streams(model, streams)
        check_foldable(model)
        blocks = _held_out(tokenizer, data, sequences, block_size)  # before the tokenizer learns of placeholders
        with _quietly():
            _write(model.eval(), tokenizer, folder, engine, weights)
        measured = {} if blocks is None else _measure(model, folder, engine, blocks)
        size = sum(file.stat().st_size for file in folder.rglob("*")) / 1e6
    return Exported(out, engine, weights, getattr(model, "streams", 1), round(size, 3), **measured)


def choose_streams(model: Any, streams: int) -> None:
    """Run the first `streams` streams only.

    Raises:
        InputError: the model has fewer, or none at all.
    """
    if hasattr(model, "set_streams"):
        model.set_streams(streams)
    elif streams != 1:
        raise InputError(f"streams={streams}: {type(model).__name__} is a plain model; leave it out or give 1")


def report_export(exported: Exported, as_json: bool) -> None:
    """Print what `export_model` wrote: what `parscale export` does."""
    if as_json:
        print_json(vars(exported) | {"folder": str(exported.folder)})
        return
    print(
        f"{exported.folder}: {exported.engine}, {exported.weights} weights, P={exported.streams}, "
        f"{exported.megabytes:,.1f} MB"
    )
    if exported.perplexity is not None:
        print(
            f"perplexity on {exported.tokens:,} held-out tokens: float32 {exported.perplexity_float32:.3f}, "
            f"as written {exported.perplexity:.3f}"
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Exporters warn of what only their own developers can mend, and show their progress where JSON is expected."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _write(model: Any, tokenizer: Any, folder: Path, engine: Engine, weights: Weights) -> None:
    if engine == "onnx":
        from parscale.export.onnx import write_onnx

        write_onnx(model, tokenizer, folder, weights)
    else:
        from parscale.export.openvino import write_openvino

        write_openvino(model, tokenizer, folder, weights)


def _held_out(tokenizer: Any, data: tuple[str, ...], sequences: int, block_size: int) -> torch.Tensor | None:
    if not data:
        return None
    from parscale.train.data import load_text, sample

    return sample(load_text(list(data), tokenizer=tokenizer, block_size=block_size).validation, sequences)


@torch.no_grad()
def _measure(model: Any, folder: Path, engine: Engine, blocks: torch.Tensor) -> dict[str, Any]:
    """Perplexity by torch in float32 and by the engine on the written files, over the same tokens."""
    if engine == "onnx":
        from parscale.export.onnx import OnnxLogits as Logits
    else:
        from parscale.export.openvino import OpenVinoLogits as Logits
    run, sums = Logits(folder), [0.0, 0.0]
    for block in blocks:
        for i, logits in enumerate((model(input_ids=block[None], use_cache=False).logits[0], run(block))):
            sums[i] += torch.nn.functional.cross_entropy(logits[:-1].float(), block[1:], reduction="sum").item()
    tokens = blocks[:, 1:].numel()
    return {
        "tokens": tokens,
        "perplexity_float32": math.exp(sums[0] / tokens),
        "perplexity": math.exp(sums[1] / tokens),
    }
