"""The main claim in minutes: a small model gains from parallel streams on real text, against the honest control.

Pretrains a plain base, then gives it stage 2 several times with the same tokens in the same order: P=1 with the
streams' prefix (the control), P=1 with as many LoRA parameters as the most streams have (what the parameters alone do),
P=2 and P=4. Knows the demo's settings for each kind of machine.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from parscale.config import StreamsConfig
from parscale.cost.measure import processor_name
from parscale.errors import InputError
from parscale.experiments.report import write_demo_report
from parscale.generate import complete
from parscale.load import load_model, load_tokenizer
from parscale.output import json_text
from parscale.probe import StreamProbe, probe_streams
from parscale.train.config import TrainConfig
from parscale.train.corpus import STDLIB
from parscale.train.data import PackedText, load_text
from parscale.train.folder import TrainResult, check_output, hold_output
from parscale.train.trainer import train
from parscale.utils.files import write_text

Scale = Literal["auto", "smoke", "cpu", "gpu"]

PROMPTS = ("def __init__(self", "import os\nimport sys\n\ndef main(", "    for key, value in ")


@dataclass(frozen=True)
class Setting:
    """Sizes and rates of one scale; chosen by measurement, see LOG.md."""

    model: str
    vocab_size: int
    block_size: int
    batch_size: int
    base_tokens: int
    tokens: int
    learning_rate: float = 3e-3
    stream_learning_rate: float = 1e-2
    lora_rank: int = 8


SETTINGS = {
    "smoke": Setting("pico", 384, 32, 8, base_tokens=20 * 8 * 32, tokens=10 * 8 * 32, lora_rank=2),
    "cpu": Setting("pico", 512, 128, 16, 800 * 16 * 128, 600 * 16 * 128, learning_rate=2e-2, stream_learning_rate=2e-2),
    "gpu": Setting("micro", 2048, 256, 128, base_tokens=3000 * 128 * 256, tokens=3000 * 128 * 256),
}


@dataclass(frozen=True)
class Row:
    """One line of the demo's table, and of `demo.json`."""

    name: str
    streams: int
    tokens: int
    seed: int
    validation_loss: float
    gain: float | None
    error_correlation: float | None
    cosine: float | None
    effective_streams: float | None
    weights: list[float] | None
    stream_parameters: int
    seconds: float


def run_demo(
    output: Path = Path("demo-out"),
    *,
    data: Sequence[str] = (STDLIB,),
    scale: Scale = "auto",
    streams: Sequence[int] = (2, 4),
    seed: int = 0,
) -> list[Row]:
    """Train base, control and streams; print the table and completions; write `demo.json` and `report.html`.

    Args:
        output: folder for models and results; it must not hold anything yet.
        data: text, as for `parscale train`.
        scale: smoke (seconds, proves the machinery), cpu, gpu; auto takes what the machine has.
        streams: the P to compare with the control.
        seed: of weights and data order.

    Raises:
        InputError: bad text, or an output folder that is not empty or in use.
    """
    if scale == "auto":
        scale = "gpu" if torch.cuda.is_available() else "cpu"
    if not streams or any(p < 2 for p in streams):
        raise InputError(f"streams={tuple(streams)} is not accepted; give one or more numbers >= 2")
    with hold_output(output, "out"):
        check_output(output)
        return _run(output, data, scale, streams, seed)


def _run(output: Path, data: Sequence[str], scale: str, streams: Sequence[int], seed: int) -> list[Row]:
    setting = SETTINGS[scale]
    console = Console()
    started = time.monotonic()
    text = load_text(list(data), vocab_size=setting.vocab_size, block_size=setting.block_size)
    console.print(
        f"{text.train_documents} training documents, {text.train_tokens:,} tokens; "
        f"{text.validation_documents} held out, {text.validation_tokens:,} tokens"
    )
    common: dict[str, Any] = {
        "batch_size": setting.batch_size,
        "block_size": setting.block_size,
        "learning_rate": setting.learning_rate,
        "stream_learning_rate": setting.stream_learning_rate,
        "seed": seed,
    }
    base = train(
        TrainConfig(
            "pretrain",
            output / "base",
            model=setting.model,
            streams=StreamsConfig(streams=1, prefix_tokens=0),
            tokens=setting.base_tokens,
            decay=0.0,
            **common,
        ),
        data=text,
        title="base",
    )
    results = {"base": base}
    for name, chosen in streams_settings(streams, setting.lora_rank).items():
        results[name] = train(
            TrainConfig(
                "retrofit",
                output / folder_of(name),
                model=str(output / "base"),
                streams=chosen,
                tokens=setting.tokens,
                decay=0.5,
                **common,
            ),
            data=text,
            title=name,
            control=output / "control" if "control" in results else None,
        )
    probes = _probe(output, text, [name for name, result in results.items() if result.streams["streams"] > 1])
    rows = _rows(results, probes)
    _print_table(console, rows)
    completions = _complete(console, output, ["control", *(row.name for row in rows if row.streams > 1)])
    record = {
        "rows": [vars(row) for row in rows],
        "scale": scale,
        "corpus": list(data),
        "completions": completions,
        "history": {name: result.history for name, result in results.items()},
        "probes": {name: probe.to_dict() for name, probe in probes.items()},
        "seconds": round(time.monotonic() - started, 1),
        "machine": machine(),
    }
    write_text(output / "demo.json", json_text(record))
    write_text(output / "report.html", write_demo_report(record))
    told = f"{record['seconds']:.0f} s. Numbers: {output / 'demo.json'}; report: {output / 'report.html'}"
    console.print(told, markup=False)
    return rows


def streams_settings(streams: Sequence[int], lora_rank: int) -> dict[str, StreamsConfig]:
    """Name → streams of every model of stage 2: the paper's prefix, and a low-rank update per stream.

    The control has the prefix alone. "control + LoRA" is one stream with an update of the summed rank of the most
    streams: as many LoRA parameters as they have, and one pass.
    """
    most = max(streams)
    return {
        "control": StreamsConfig(streams=1),
        "control + LoRA": StreamsConfig(streams=1, diversify=("prefix", "lora"), lora_rank=most * lora_rank),
    } | {
        f"P={p}": StreamsConfig(streams=p, diversify=("prefix", "lora"), lora_rank=lora_rank)
        for p in sorted(set(streams))
    }


def folder_of(name: str) -> str:
    """Where a model of the demo is saved, within its output."""
    return name.lower().replace("=", "").replace(" + ", "-")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "platform": platform.platform(),
        "processor": processor_name("cuda" if torch.cuda.is_available() else "cpu"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _probe(output: Path, text: PackedText, names: list[str]) -> dict[str, StreamProbe]:
    ids = torch.as_tensor(text.validation[:64]["input_ids"])
    control = load_model(output / folder_of("control"))
    return {name: probe_streams(load_model(output / folder_of(name)), ids, control=control) for name in names}


def _rows(results: dict[str, TrainResult], probes: dict[str, StreamProbe]) -> list[Row]:
    control = results["control"].validation_loss
    rows = []
    for name, result in results.items():
        probe = probes.get(name)
        rows.append(
            Row(
                name=name,
                streams=result.streams["streams"],
                tokens=result.tokens,
                seed=result.seed,
                validation_loss=result.validation_loss,
                gain=None if name in ("base", "control") else control - result.validation_loss,
                error_correlation=probe.error_correlation if probe else None,
                cosine=probe.cosine if probe else None,
                effective_streams=probe.effective_streams if probe else None,
                weights=probe.weights if probe else None,
                stream_parameters=result.stream_parameters,
                seconds=result.seconds,
            )
        )
    return rows


def _print_table(console: Console, rows: list[Row]) -> None:
    table = Table(
        title="Validation loss (nats per token) after stage 2: same base, same tokens",
        caption="control: P=1 with a prefix. gain: below it. ρ: correlation of errors. added: parameters.",
    )
    for column in ("model", "loss", "gain", "ρ", "weights", "added", "s"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.validation_loss:.4f}",
            "" if row.gain is None else f"{row.gain:+.4f}",
            "" if row.error_correlation is None else f"{row.error_correlation:.2f}",
            "/".join(f"{w:.2f}".lstrip("0") for w in row.weights or []),
            f"{row.stream_parameters:,}",
            f"{row.seconds:.0f}",
        )
    console.print(table)


def _complete(console: Console, output: Path, names: list[str]) -> list[dict[str, Any]]:
    found = []
    for name in names:
        model, tokenizer = load_model(output / folder_of(name)), load_tokenizer(output / folder_of(name))
        for prompt in PROMPTS:
            text = complete(model, tokenizer, prompt, max_new_tokens=32)
            found.append({"model": name, "prompt": prompt, "completion": text})
            console.print(f"[bold]{name}[/] {escape(f'{prompt!r} → {text!r}')}", highlight=False)
    return found
