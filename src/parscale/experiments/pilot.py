"""`parscale pilot`: should I use streams? Short frozen runs on one's own model and text, the gain, and its cost."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from parscale.config import StreamsConfig
from parscale.cost.measure import latency_ratios
from parscale.cost.model import Workload, cost, shape_of
from parscale.errors import InputError
from parscale.evaluate.perplexity import DocumentLosses, bootstrap_of_documents, document_losses
from parscale.load import load_model, load_tokenizer, on_accelerator
from parscale.output import json_text, print_json, print_table
from parscale.streams.parallelize import parallelize
from parscale.train.config import TrainConfig
from parscale.train.corpus import read_documents, split_documents
from parscale.train.data import PackedText, load_text, sample
from parscale.train.folder import check_output, hold_output
from parscale.train.shapes import check_context
from parscale.train.stages import count_stream_parameters, freeze_backbone
from parscale.train.trainer import train
from parscale.utils.files import write_text

STREAMS = (2, 4)
LORA_RANK = 8
LEAST_DOCUMENTS, LEAST_STEPS, MOST_STEPS = 5, 10, 3000
FEW_STEPS = 100
"""Below it no answer is given: streams that start alike have hardly had the time to part."""
HELD_OUT, HELD_OUT_TOKENS, HELD_OUT_DOCUMENTS = 0.05, 50_000, 50
"""Of the text, the share that is held out; of that, so many tokens of so many documents are read: an interval needs
documents, and one that is long would take all the tokens."""
PLAN, RECORD = "plan.json", "pilot.json"
EVALUATIONS, EVALUATION_BLOCKS = 4, 32
INPUT, OUTPUT = 64, 16
"""Tokens of the request that is measured."""
OVERHEAD = 1.2
"""Of a step over its forward and backward pass: the optimiser, looks at the streams, logs."""


@dataclass(frozen=True)
class PilotRow:
    """One kind of adaptation. Losses in nats per token on held-out documents; `gain`, with `low` and `high`, its 95 %
    interval over documents, is over the control. `latency_ratio` and `memory_ratio` are against the model as it is."""

    name: str
    loss: float
    gain: float | None
    low: float | None
    high: float | None
    parameters: int
    growing: bool | None
    """Whether the second half of the run gained more over the control than the first."""
    latency_ratio: float | None
    memory_ratio: float | None


def run_pilot(
    name: str,
    *,
    data: Sequence[str],
    minutes: float = 20.0,
    out: Path = Path("pilot-out"),
    block_size: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    as_json: bool = False,
) -> dict[str, Any]:
    """Train a control, streams and a LoRA of as many parameters on a frozen model; tell whether streams pay.

    Args:
        name: folder or hub name of a model without streams.
        data: your text.
        minutes: to spend on training, about.
        out: folder of the runs and of `pilot.json`; a pilot that was stopped goes on.
        block_size: tokens in a sequence.
        batch_size: sequences a step.
        seed: of everything.
        as_json: print JSON instead of tables.

    Raises:
        InputError: a model or text that cannot serve, or a folder that holds something else or is in use.
    """
    if not minutes > 0:
        raise InputError(f"minutes={minutes} is not accepted; give a number above 0")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is not accepted; give an integer >= 1")
    with hold_output(out, "out"):
        record = _train_and_compare(name, data, minutes, out, block_size, batch_size, seed)
        write_text(out / RECORD, json_text(record))
    _print(record, as_json)
    return record


def _train_and_compare(
    name: str, data: Sequence[str], minutes: float, out: Path, block_size: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """What the pilot found: the content of `pilot.json`."""
    if not (out / PLAN).is_file():
        check_output(out)
    tokenizer = load_tokenizer(name)
    text = load_text(list(data), tokenizer=tokenizer, block_size=block_size, validation_fraction=HELD_OUT)
    runs = _runs(name)
    steps = _plan(name, data, text, runs, minutes, out, batch_size)
    held_out = split_documents(read_documents(list(data)), HELD_OUT)[1]
    losses, results = {}, {}
    for folder, (label, streams) in zip(("control", "p2", "p4", "lora"), runs.items(), strict=True):
        results[label] = train(
            TrainConfig(
                "frozen",
                out / folder,
                name,
                streams,
                tokens=steps * batch_size * block_size,
                batch_size=batch_size,
                block_size=block_size,
                evaluations=EVALUATIONS,
                validation_blocks=EVALUATION_BLOCKS,
                seed=seed,
                resume=True,
            ),
            data=text,
            title=label,
        )
        losses[label] = _held_out(load_model(out / folder), tokenizer, held_out, block_size)
    before = _held_out(load_model(name), tokenizer, held_out, block_size)
    costs = _costs(name, runs)
    rows = [_row(label, losses, results, costs) for label in runs]
    over_lora = {f"P={p}": compare(losses[f"P={p}"], losses["LoRA"]) for p in STREAMS}
    return {
        "model": name,
        "data": list(data),
        "steps": steps,
        "documents": len(before.tokens),
        "loss_before": before.mean,
        "rows": [vars(row) for row in rows],
        "over_lora": over_lora,
        "law": _projection(name),
        "cost": f"latency measured here: {INPUT} tokens in, {OUTPUT} out, batch 1; memory derived",
        "verdict": judge(rows, over_lora, len(before.tokens), steps),
    }


def compare(ours: DocumentLosses, theirs: DocumentLosses) -> tuple[float, float, float]:
    """(gain, low, high) of `ours` over `theirs` on the same documents, nats per token."""
    more = theirs.nats - ours.nats
    return (float(more.sum() / ours.tokens.sum()), *bootstrap_of_documents(more, ours.tokens))


def judge(
    rows: Sequence[PilotRow], over_lora: Mapping[str, tuple[float, float, float]], documents: int, steps: int
) -> str:
    """One plain sentence."""
    if documents < LEAST_DOCUMENTS:
        return f"Undecided: held-out documents are too few ({documents}) for an interval; give text in more documents."
    if steps < FEW_STEPS:
        return (
            f"Undecided: {steps} steps were all that the minutes gave on this machine, and fewer than {FEW_STEPS} tell "
            "nothing; give more minutes, or a smaller batch_size or block_size."
        )
    streamed = [row for row in rows if row.name in over_lora]
    best = max(streamed, key=lambda row: row.gain or -math.inf)
    gain, low, high = best.gain or 0.0, best.low or 0.0, best.high or 0.0
    told = f"{best.name} gains {gain:+.4f} nats [{low:+.4f}, {high:+.4f}] over the control"
    if high <= 0:
        return f"No: {told}."
    if low <= 0:
        return f"Undecided: {told}; give more minutes or more text."
    lora, lora_low, lora_high = over_lora[best.name]
    told += f" and {lora:+.4f} [{lora_low:+.4f}, {lora_high:+.4f}] over a LoRA of the parameters of P={STREAMS[-1]}"
    if best.latency_ratio is not None:
        told += f", at {best.latency_ratio:.2f} times the latency"
    if lora_high <= 0:
        return f"No, take the LoRA, which costs no latency: {told}."
    return f"Yes: {told}." if lora_low > 0 else f"Undecided: {told}; the LoRA may do as well."


def _runs(name: str) -> dict[str, StreamsConfig]:
    """The control, the streams, and a LoRA of as many parameters as the most streams have, as nearly as a rank can.

    All start at the model's own loss: in a short run, what a random prefix does to a frozen model is never made good.
    """
    start: dict[str, Any] = {"prefix_init": "near_identity"}
    runs = {"control": StreamsConfig(1, **start)} | {
        f"P={p}": StreamsConfig(p, diversify=("prefix", "lora"), lora_rank=LORA_RANK, **start) for p in STREAMS
    }
    goal = _parameters(name, runs[f"P={STREAMS[-1]}"])
    one, two = (_parameters(name, StreamsConfig(1, 0, diversify=("lora",), lora_rank=rank)) for rank in (1, 2))
    rank = max(1, round((goal - one) / (two - one)) + 1)
    return runs | {"LoRA": StreamsConfig(1, 0, diversify=("lora",), lora_rank=rank)}


def _parameters(name: str, streams: StreamsConfig) -> int:
    return count_stream_parameters(parallelize(load_model(name), streams))


def _plan(
    name: str,
    data: Sequence[str],
    text: PackedText,
    runs: Mapping[str, StreamsConfig],
    minutes: float,
    out: Path,
    batch_size: int,
) -> int:
    """Steps of each run, so that all together take the minutes; decided once, so that a stopped pilot goes on."""
    file, asked = out / PLAN, {"model": name, "data": list(data), "minutes": minutes}
    if file.is_file():
        plan = json.loads(file.read_text(encoding="utf-8"))
        for what, ours in asked.items():
            if (theirs := plan.get(what)) != ours:
                raise InputError(f"out={out} holds a pilot with {what}={theirs!r}, not {ours!r}; give another out")
        if plan.get("text", text.fingerprint) != text.fingerprint:
            raise InputError(
                f"out={out} holds a pilot on another text than data={list(data)} has now, or with another block_size; "
                "give another out"
            )
        return plan["steps"]
    total = sum(_seconds_of_a_step(name, text, streams, batch_size) for streams in runs.values())
    evaluating = (EVALUATIONS + 1) * EVALUATION_BLOCKS / batch_size / 3  # in steps, of which a forward pass is a third
    steps = min(MOST_STEPS, max(LEAST_STEPS, int(60 * minutes / (OVERHEAD * total) - evaluating)))
    write_text(file, json.dumps(asked | {"steps": steps, "text": text.fingerprint}))
    return steps


def _seconds_of_a_step(name: str, text: PackedText, streams: StreamsConfig, batch_size: int) -> float:
    """The quicker of two forward and backward passes."""
    model = load_model(name)
    check_context(model, text.block_size, name)
    model = parallelize(on_accelerator(model), streams)
    freeze_backbone(model, "frozen")
    ids = sample(text.train, batch_size).to(model.device)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if ids.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _held_out(model: Any, tokenizer: Any, documents: Sequence[Any], block_size: int) -> DocumentLosses:
    each = HELD_OUT_TOKENS // min(len(documents), HELD_OUT_DOCUMENTS)
    options = {"block_size": block_size, "tokens": HELD_OUT_TOKENS, "each": each}
    return document_losses(on_accelerator(model), tokenizer, documents, **options)


def _row(
    label: str, losses: Mapping[str, DocumentLosses], results: Mapping[str, Any], costs: Mapping[str, Any]
) -> PilotRow:
    result = results[label]
    row = PilotRow(label, losses[label].mean, None, None, None, result.stream_parameters, None, None, None)
    if label == "control":
        return row
    gain, low, high = compare(losses[label], losses["control"])
    ours, control = (
        {entry["step"]: entry["eval_loss"] for entry in found.history if "eval_loss" in entry}
        for found in (result, results["control"])
    )
    gains = [control[step] - ours[step] for step in sorted(ours.keys() & control.keys())]
    growing = gains[-1] > gains[len(gains) // 2 - 1] if len(gains) > 1 else None
    latency, memory = costs.get(label, (None, None))
    return replace(row, gain=gain, low=low, high=high, growing=growing, latency_ratio=latency, memory_ratio=memory)


def _costs(name: str, runs: Mapping[str, StreamsConfig]) -> dict[str, tuple[float, float | None]]:
    """Latency, measured here, and memory, derived, over those of the model as it is. A LoRA is merged: it costs
    nothing. Memory is None for a model whose shape the formulas do not know."""
    work = Workload(input=INPUT, output=OUTPUT, accounting="counted")
    model = on_accelerator(load_model(name)).eval()
    ratios = latency_ratios(model, [runs[f"P={p}"] for p in STREAMS], work, repeats=3)
    try:
        shape = shape_of(name)
        held = [cost(shape, replace(work, streams=p))["memory_gib"] for p in (1, *STREAMS)]
        memory: list[float | None] = [one / held[0] for one in held[1:]]
    except InputError:
        memory = [None] * len(STREAMS)
    found: dict[str, tuple[float, float | None]] = {"LoRA": (1.0, 1.0)}
    return found | {f"P={p}": pair for p, pair in zip(STREAMS, zip(ratios, memory, strict=True), strict=True)}


def _projection(name: str) -> dict[str, Any]:
    """What the paper's law for code gives a model of this size, trained with streams from scratch."""
    from parscale.law.fit import law_of

    model = load_model(name)
    params = model.num_parameters() - model.get_input_embeddings().weight.numel()
    law = law_of("stack")
    gains = {f"P={p}": float(law.predict(params, 1) - law.predict(params, p)) for p in STREAMS}
    return {"params": params, "gains": gains, "extrapolated": bool(params < law.runs.params.min())}


def _print(record: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(record)
        return
    console = Console()
    print_table(f"{record['model']}, {record['steps']} steps each, frozen backbone", record["rows"])
    law = record["law"]
    gains = ", ".join(f"{name} {gain:.3f}" for name, gain in law["gains"].items())
    outside = ", far outside of its range" if law["extrapolated"] else ""
    console.print(f"before: {record['loss_before']:.4f} nats on {record['documents']} held-out documents")
    console.print(f"cost: {record['cost']}", highlight=False, markup=False)
    console.print(f"the paper's law, streams from the first token, {law['params']:,} parameters{outside}: {gains}")
    console.print(record["verdict"], style="bold", highlight=False, markup=False)
