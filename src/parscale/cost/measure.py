"""Costs measured on the machine at hand, beside the derived ones: random weights of the asked shape, every P and batch.

The floors that nothing can beat are measured in the same run, so that what is left is the code's own: bandwidth by a
matrix-vector product, which only waits for memory, and arithmetic by a product of large matrices.
"""

import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from parscale.config import StreamsConfig
from parscale.cost import formulas
from parscale.cost.hardware import Hardware
from parscale.cost.model import GIB, Shape, Workload, cost, shape_of, workloads
from parscale.errors import InputError
from parscale.output import passing_bar

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REPEATS = 5
LEAST_REPEATS = 3  # fewer have no quartiles


def measure_table(
    model: str | Path | Shape,
    streams: Iterable[int],
    batches: Iterable[int],
    workload: Workload,
    hardware: str | Path | Hardware | None = None,
    repeats: int = REPEATS,
    layers: int | None = None,
) -> list[dict[str, Any]]:
    """Measure every pair of streams and batch, in the order of `cost_table` and with its keys, and beside them

    - `layers`, `layers_of_model`: measured and derived are both of the first; nothing is scaled up to the second.
    - `measured`: `prefill`, `decode_step` (mean over the output) and `request`, each {median, q1, q3} in seconds over
      `repeats` rounds that run every case once; `peak_gib`, None where the system does not tell.
    - `floor`: seconds of `prefill` and `decode_step` that neither the measured bandwidth nor arithmetic can beat.
    - `machine`: name, flops (of the dtype), bandwidth, memory. It is a hardware file.

    `hardware` derives the costs for another machine; by default they are derived for `machine`, all of it used. P = 1
    is the plain model over the same weights. Raises InputError for what cannot be measured: quantised weights, more
    layers than the model has, a model that does not fit into the memory at hand.
    """
    whole = shape_of(model)
    shape = _measurable(whole, workload, repeats, layers)
    asked = workloads(workload, streams, batches)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _require_memory(shape, asked, device)
    floors = Floors(device, TORCH_DTYPES[workload.dtype])
    floors.measure()
    with torch.no_grad():
        before = _settled_memory(device)
        cases = _cases(shape, asked, device)
        rounds = _interleaved([case.run for case in cases], repeats)
        peaks = [_peak_gib(case.run, before, device) for case in cases]
    floors.measure()
    machine = floors.machine()
    rows = []
    for work, seconds, peak in zip(asked, rounds, peaks):
        here = replace(work, flops_efficiency=1.0, bandwidth_efficiency=1.0)
        derived = cost(shape, here, machine) if hardware is None else cost(shape, work, hardware)
        rows.append(
            derived
            | {
                "layers": shape.layers,
                "layers_of_model": whole.layers,
                "repeats": repeats,
                "measured": {name: _spread(values) for name, values in seconds.items()} | {"peak_gib": peak},
                "floor": _floor(shape, replace(here, accounting="counted"), machine),
                "machine": {name: value for name, value in asdict(machine).items() if name != "flops32"},
            }
        )
    return rows


class Floors:
    """The best that this machine does: a run's first and last moments are both looked at, for it may be busy in one."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.bandwidth = self.flops = 0.0

    def measure(self, repeats: int = 5) -> None:
        """Bytes/s of reading 512 MiB once, FLOP/s of a square product in the dtype; the best seen so far."""
        matrix, vector = torch.ones(2**14, 2**13, device=self.device), torch.ones(2**13, device=self.device)
        seconds = min(_seconds(lambda: matrix @ vector, self.device) for _ in range(repeats))
        self.bandwidth = max(self.bandwidth, matrix.nbytes / seconds)
        del matrix, vector
        side = 8192 if self.device == "cuda" else 2048
        square = torch.randn(side, side, device=self.device).to(self.dtype)
        seconds = min(_seconds(lambda: square @ square, self.device) for _ in range(repeats))
        self.flops = max(self.flops, 2 * side**3 / seconds)

    def machine(self) -> Hardware:
        """The machine as the formulas take it; its 32-bit arithmetic is that of the dtype measured."""
        memory = float(_total_memory(self.device))
        return Hardware(_name(self.device), self.flops, self.flops, self.bandwidth, memory)


@torch.no_grad()
def latency_ratios(
    model: Any, streams: Iterable[StreamsConfig], workload: Workload, repeats: int = REPEATS
) -> list[float]:
    """What a request takes with streams of each configuration, over what it takes the plain model itself: the median,
    over rounds that run all of them once. The streams are new, which costs what trained ones cost."""
    from parscale.streams.parallelize import over_its_weights

    models = [model] + [over_its_weights(model, replace(one, prefix_init="normal")) for one in streams]
    prompt = torch.randint(model.config.vocab_size, (workload.batch, workload.input), device=model.device)
    cases = [Case(one, replace(workload, streams=getattr(one, "streams", 1)), prompt) for one in models]
    plain, *others = _interleaved([case.run for case in cases], repeats)
    ratios = [[a / b for a, b in zip(other["request"], plain["request"], strict=True)] for other in others]
    return [statistics.median(of_rounds) for of_rounds in ratios]


@dataclass(frozen=True)
class Case:
    """One request batch at one P: `prompt` is (batch, input) token ids."""

    model: Any
    work: Workload
    prompt: torch.Tensor

    def run(self) -> dict[str, float]:
        """Seconds of the prefill, of one decode step (mean over the output), and of both together."""
        from transformers import DynamicCache

        if self.work.streams > 1:
            self.model.set_streams(self.work.streams)
        cache, device = DynamicCache(config=self.model.config), self.prompt.device.type

        def step(ids: torch.Tensor) -> Any:
            return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        prefill = _seconds(lambda: step(self.prompt), device)
        decode = _seconds(lambda: [step(self.prompt[:, :1]) for _ in range(self.work.output)], device)
        return {"prefill": prefill, "decode_step": decode / self.work.output, "request": prefill + decode}


def _measurable(shape: Shape, workload: Workload, repeats: int, layers: int | None) -> Shape:
    """The shape to measure: `shape`, with as many layers as asked for."""
    if workload.dtype not in TORCH_DTYPES:
        raise InputError(
            f"dtype {workload.dtype!r} cannot be measured: random weights are made in {', '.join(TORCH_DTYPES)} only"
        )
    if repeats < LEAST_REPEATS:
        raise InputError(f"repeats is {repeats}: medians with quartiles need at least {LEAST_REPEATS}")
    if layers is not None and not 1 <= layers <= shape.layers:
        raise InputError(f"layers is {layers}: this model has {shape.layers}, give 1 to {shape.layers}")
    if shape.head_dim % 2:
        raise InputError(f"heads of size {shape.head_dim:g} cannot be measured: rotary positions need an even number")
    return replace(shape, layers=layers or shape.layers)


def _require_memory(shape: Shape, asked: list[Workload], device: str) -> None:
    # With the streams' tensors of the largest P in place at every P: the largest case has them all.
    need = max(cost(shape, replace(work, accounting="counted"))["memory_gib"] for work in asked)
    free = _free_memory(device) / GIB
    if need > free:
        raise InputError(
            f"measuring this takes about {need:.3g} GiB and {free:.3g} GiB are free: "
            "give fewer layers with --layers, a smaller model, batch or streams"
        )


def _cases(shape: Shape, asked: list[Workload], device: str) -> list[Case]:
    """A case for every workload: the plain model for P = 1, one with streams over the same weights for the rest."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    from parscale.streams.parallelize import over_its_weights

    work = asked[0]
    torch.manual_seed(0)
    kind: Any = Qwen2Config if shape.bias else LlamaConfig
    config = kind(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=int(shape.head_dim),
        vocab_size=shape.vocab,
        tie_word_embeddings=not shape.untied,
        max_position_embeddings=work.input + work.output,
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[work.dtype]).to(device).eval()
    models, most = {False: plain}, max(one.streams for one in asked)
    if most > 1:
        settings = StreamsConfig(streams=most, prefix_tokens=work.prefix_tokens, kv=work.kv)
        models[True] = over_its_weights(plain, settings)
    return [
        Case(models[one.streams > 1], one, torch.randint(shape.vocab, (one.batch, one.input), device=device))
        for one in asked
    ]


def _interleaved(runs: list[Callable[[], dict[str, float]]], repeats: int) -> list[dict[str, list[float]]]:
    """Every run once a round, so that a machine that drifts is fair to all; the first round only warms up."""
    with passing_bar(auto_refresh=False) as progress:  # no thread beside the clock
        todo = progress.add_task("measuring", total=(1 + repeats) * len(runs))

        def one(run: Callable[[], dict[str, float]]) -> dict[str, float]:
            told = run()
            progress.advance(todo)
            progress.refresh()
            return told

        rounds = [[one(run) for run in runs] for _ in range(1 + repeats)][1:]
    return [{name: [row[i][name] for row in rounds] for name in rounds[0][i]} for i in range(len(runs))]


def _spread(seconds: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def _floor(shape: Shape, work: Workload, machine: Hardware) -> dict[str, float]:
    """Weights and cache read once, or all operations at the machine's peak: whichever takes longer."""
    s, w = asdict(shape), work.terms()
    held = formulas.memory(s, w)
    looked_up = w["value"] * s["untied"] * s["vocab"] * s["hidden"]  # an untied input embedding: a few rows are read
    weights = held["weights"] + held["aggregation_head"] - looked_up
    compute = formulas.latency(s, w, {"flops": machine.flops, "bandwidth": float("inf")})
    cache = formulas.latency(s, w, {"flops": float("inf"), "bandwidth": machine.bandwidth})["cache_traffic"]
    return {
        "prefill": max(compute["prefill"], weights / machine.bandwidth),
        "decode_step": max(compute["decode_step"], weights / machine.bandwidth + cache),
    }


def _seconds(run: Callable[[], Any], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _settled_memory(device: str) -> float | None:
    """Bytes held now, with nothing left over from before, and the peak counted from here. None: the system keeps it to
    itself."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # a sandbox; a C library without malloc_trim
        return None
    return _of_proc("/proc/self/status", "VmRSS")


def _peak_gib(run: Callable[[], Any], before: float | None, device: str) -> float | None:
    """The most that was held during `run`, above what was held `before` the model was."""
    settled = _settled_memory(device)
    run()
    if before is None or settled is None:
        return None
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _of_proc("/proc/self/status", "VmHWM")
    return (peak - before) / GIB


def _free_memory(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _of_proc("/proc/meminfo", "MemAvailable") if sys.platform == "linux" else _total_memory(device)


def _total_memory(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _of_proc(file: str, field: str) -> float:
    """Bytes of a line like `VmRSS:   1234 kB`."""
    lines = Path(file).read_text().splitlines()
    return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def processor_name(device: str) -> str:
    """What the maker calls the processor or accelerator."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    known = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in known if line.startswith("model name")), platform.machine())


def _name(device: str) -> str:
    return processor_name(device) + ("" if device == "cuda" else f", {torch.get_num_threads()} threads")
