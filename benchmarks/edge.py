"""Which engine and width at the edge: torch, ONNX Runtime and OpenVINO, in float32, bfloat16, int8 and int4, at each P.

    python benchmarks/edge.py                              # 0.5 B, random weights: needs 14 GB and the extras
    python benchmarks/edge.py --layers 2 --vocab 2000 --new 8 --rounds 3 --name edge_small     # small, to try it

It goes on where it stopped: rows of the same settings that are in the result file are not measured again. To write the
graphs takes longer than to time them: `--graphs FOLDER` (20 GB) keeps them there, and `--prepare` only writes them.

Each cell is a process of its own, which loads one model, reads a prompt and then times single tokens, `--rounds` times
`--new` of them; the widths of an engine follow each other, so that the machine's drift falls on neighbours alike. Timed
are the engines' graphs, as their GenAI packages run them, without sampling and tokenising; the cache grows as in use.
`floor_ms` is the time to read a token's weights and cache once, at the bandwidth measured at the start. ONNX Runtime
has no bfloat16 on CPUs; torch's int8 and int4 are those of quantized.py. Random weights: speed and memory only.
"""

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, write
from worker import bandwidth, bytes_read

ENGINES = {
    "torch": ("float32", "bfloat16", "int8", "int4"),
    "onnx": ("float32", "int8", "int4"),
    "openvino": ("float32", "bfloat16", "int8", "int4"),
}
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}
Step = Callable[[np.ndarray, int], None]


def model_of(options: argparse.Namespace, streams: int) -> Any:
    """A Qwen2 of Qwen2.5-0.5B's shape, random."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    import parscale

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=options.layers, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=options.vocab, tie_word_embeddings=True, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    if streams > 1:
        parscale.parallelize(model, parscale.StreamsConfig(streams=streams))
    return model


def torch_step(options: argparse.Namespace, streams: int, weights: str) -> Step:
    from quantized import quantize

    model = model_of(options, streams)
    if weights != "float32":
        model = model.to(torch.bfloat16)
    if weights in ("int8", "int4"):
        quantize(model.model.layers, int(weights.removeprefix("int")))
    held: dict[str, Any] = {"cache": None}

    def step(ids: np.ndarray, cached: int) -> None:
        with torch.no_grad():
            cache = held["cache"] if cached else None
            out = model(input_ids=torch.from_numpy(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
        held["cache"] = out.past_key_values

    return step


def onnx_step(options: argparse.Namespace, streams: int, weights: str) -> Step:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    folder = written("onnx", options, streams, weights)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), settings, providers=["CPUExecutionProvider"])
    drop(folder, options)
    names = [port.name for port in session.get_inputs()][3:]
    shapes = [port.shape for port in session.get_inputs()][3:]
    held: dict[str, Any] = {}

    def step(ids: np.ndarray, cached: int) -> None:
        if not cached:
            held["past"] = [np.zeros((1, shape[1], 0, shape[3]), np.float32) for shape in shapes]
        tokens = ids.shape[1]
        inputs = dict(zip(names, held["past"], strict=True)) | inputs_of(ids, cached)
        held["past"] = session.run(None, inputs)[1:]
        assert held["past"][0].shape[2] == cached + tokens

    return step


def openvino_step(options: argparse.Namespace, streams: int, weights: str) -> Step:
    import openvino

    folder = written("openvino", options, streams, weights)
    core = openvino.Core()
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = "f32" if weights == "float32" else "bf16"
    graph = core.read_model(folder / "openvino_model.xml")
    placeholders = [int(value) for value in graph.get_rt_info(["parscale", "placeholders"]).value.split()]
    request = core.compile_model(graph, "CPU", settings).create_infer_request()
    del graph
    drop(folder, options)

    def step(ids: np.ndarray, cached: int) -> None:
        if not cached:
            request.reset_state()
            ids = np.concatenate([np.full((1, placeholders[0]), placeholders[1]), ids], axis=1)
        else:
            cached += placeholders[0]
        request.infer(inputs_of(ids, cached) | {"beam_idx": np.zeros(1, np.int32)})

    return step


STEPS = {"torch": torch_step, "onnx": onnx_step, "openvino": openvino_step}


def inputs_of(ids: np.ndarray, cached: int) -> dict[str, np.ndarray]:
    tokens = ids.shape[1]
    return {
        "input_ids": ids,
        "attention_mask": np.ones((1, cached + tokens), np.int64),
        "position_ids": np.arange(cached, cached + tokens)[None],
    }


def written(engine: str, options: argparse.Namespace, streams: int, weights: str) -> Path:
    """A folder with the graph alone, written by another process, so that its memory does not count here."""
    weights = "float32" if weights == "bfloat16" else weights  # OpenVINO computes one graph in either
    whole = Path(options.graphs or tempfile.mkdtemp(dir=options.scratch)) / f"{engine}-{streams}-{options.layers}"
    if not whole.exists():
        partial = whole.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        call = [sys.executable, __file__, "--write", engine, str(partial), "--cell", engine, weights, str(streams)]
        subprocess.run([*call, *passed_on(options)], check=True, stdout=subprocess.DEVNULL)
        partial.rename(whole)
    return whole / weights


def drop(folder: Path, options: argparse.Namespace) -> None:
    if not options.graphs:
        shutil.rmtree(folder.parents[1])


def write_graphs(engine: str, folder: Path, options: argparse.Namespace, streams: int, weights: str) -> None:
    """The float32 graph, and the others from it; only that of `weights` where they are not kept."""
    from parscale.train.data import train_tokenizer

    model, tokenizer = model_of(options, streams), train_tokenizer(["a text"], 300)
    for name in ("float32", "int8", "int4"):
        (folder / name).mkdir()
    wanted = [name for name in ("int8", "int4") if options.graphs or name == weights]
    if engine == "onnx":
        import onnx as format_

        from parscale.export import onnx

        onnx.write_onnx(model, tokenizer, folder / "float32")
        for name in wanted:
            onnx.save(onnx.quantize(format_.load(folder / "float32" / onnx.FILE), name), folder / name)
    else:
        import openvino as runtime

        from parscale.export import openvino

        openvino.write_openvino(model, tokenizer, folder / "float32")
        for name in wanted:
            graph = openvino.compress(runtime.Core().read_model(folder / "float32" / openvino.FILE), name)
            runtime.save_model(graph, folder / name / openvino.FILE, compress_to_fp16=False)


def cell(options: argparse.Namespace, engine: str, weights: str, streams: int) -> dict[str, Any]:
    """One row: milliseconds of a token and of the prompt, and the most memory while decoding."""
    generator = np.random.default_rng(0)
    prompt = generator.integers(3, options.vocab, (1, options.prompt))
    step = STEPS[engine](options, streams, weights)
    gc.collect()
    step(prompt, 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: without loading and prefill
    start = time.perf_counter()
    step(prompt, 0)
    prefill, seconds, cached = time.perf_counter() - start, [], options.prompt
    for _ in range(options.rounds * options.new):
        token = generator.integers(3, options.vocab, (1, 1))
        start = time.perf_counter()
        step(token, cached)
        seconds.append(time.perf_counter() - start)
        cached += 1
    quartiles = statistics.quantiles(seconds, n=4)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "engine": engine, "weights": weights, "streams": streams,
        "ms": round(1e3 * quartiles[1], 3),
        "ms_q1": round(1e3 * quartiles[0], 3), "ms_q3": round(1e3 * quartiles[2], 3),
        "tokens_per_second": round(1 / quartiles[1], 2), "prefill_ms": round(1e3 * prefill, 1),
        "peak_mb": round(int(lines["VmHWM"].split()[0]) * 1024 / 1e6, 1),
    }  # fmt: skip


def floor_bytes(options: argparse.Namespace, weights: str, streams: int) -> float:
    """What a decoded token must read: each matrix once in its own width, and the cache of every stream."""
    with torch.device("meta"):
        model = model_of(options, 1)
    numbers = bytes_read(model, None, 0) / 4
    width = BYTES[weights]
    context = options.prompt + options.rounds * options.new // 2
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * context * streams
    return numbers * width + cache * min(4.0, max(2.0, width))


def passed_on(options: argparse.Namespace) -> list[str]:
    names = ("layers", "vocab", "prompt", "new", "rounds", "scratch", "graphs", "threads")
    return [part for name in names for part in (f"--{name}", str(getattr(options, name)))]


def measured_before(name: str, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], float]:
    """Rows of the result file without an error, and the bandwidth (GB/s) that it was begun with; now if there is none
    of these settings."""
    path = RESULTS / f"{name}.json"
    record = json.loads(path.read_text()) if path.exists() else {"settings": {}, "rows": []}
    before = dict(record["settings"])
    speed = before.pop("bandwidth_gb_s", None)
    if speed is None or before != settings:
        return [], round(bandwidth(), 2)
    return [row for row in record["rows"] if "error" not in row], speed


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--layers", type=int, default=24)
    arguments.add_argument("--vocab", type=int, default=32000)
    arguments.add_argument("--prompt", type=int, default=128, help="tokens")
    arguments.add_argument("--new", type=int, default=16, help="tokens in a round")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--streams", type=int, nargs="*", default=[1, 2, 4, 8])
    arguments.add_argument("--engines", nargs="*", default=list(ENGINES))
    arguments.add_argument("--weights", nargs="*", default=list(BYTES))
    arguments.add_argument("--scratch", default=tempfile.gettempdir(), help="folder for graphs, 3 GB")
    arguments.add_argument("--graphs", default="", help="folder to keep all graphs in")
    arguments.add_argument("--prepare", action="store_true", help="write the graphs to --graphs, time nothing")
    arguments.add_argument("--name", default="edge")
    arguments.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    arguments.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.cell:
        engine, weights, streams = options.cell
        if options.write:
            write_graphs(engine, Path(options.write[1]), options, int(streams), weights)
        else:
            print(json.dumps(cell(options, engine, weights, int(streams))))
        return
    cells = [
        (engine, weights, streams)
        for engine in options.engines
        for weights in ENGINES[engine]
        for streams in (options.streams if weights in options.weights else ())
    ]
    if options.prepare:
        for engine, weights, streams in cells:
            if engine != "torch":
                print(written(engine, options, streams, weights), flush=True)
        return
    settings = {name: getattr(options, name) for name in ("layers", "vocab", "prompt", "new", "rounds", "threads")}
    rows, speed = measured_before(options.name, settings)
    done = {(row["engine"], row["weights"], row["streams"]) for row in rows}
    for engine, weights, streams in cells:
        if (engine, weights, streams) in done:
            continue
        call = [sys.executable, __file__, "--cell", engine, weights, str(streams), *passed_on(options)]
        told = subprocess.run(call, check=False, capture_output=True, text=True)
        row = {"engine": engine, "weights": weights, "streams": streams, "error": told.stderr[-300:]}
        if told.returncode == 0:
            row = json.loads(told.stdout.splitlines()[-1])
            row["floor_ms"] = round(floor_bytes(options, weights, streams) / speed / 1e6, 3)
        rows.append(row)
        print(row, flush=True)
        write(options.name, settings | {"bandwidth_gb_s": speed}, rows)


if __name__ == "__main__":
    main()
