"""The command line: one function a verb, each calling one function of the library.

Imports stand inside the verbs, so that each loads only what it needs.
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from parscale.arguments import parse
from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.experiments import verbs as experiment_verbs
from parscale.law import verbs as law_verbs
from parscale.output import drop_unwritten, flush_output, reader_is_gone
from parscale.serve.limits import Limits

Model = Annotated[str, tyro.conf.Positional]


def demo(
    out: Path = Path("demo-out"),
    data: tuple[str, ...] = ("stdlib",),
    scale: Literal["auto", "smoke", "cpu", "gpu"] = "auto",
    streams: tuple[int, ...] = (2, 4),
    seed: int = 0,
) -> None:
    """Watch a small model gain from parallel streams on real text, against the control: four minutes on two CPU cores.

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
    hard_entropy: float | None = None,
) -> None:
    """Complete a prompt, printing the text as it comes.

    Args:
        model: a folder or a hub name, with or without streams.
        prompt: the text to go on from.
        streams: run this many of the model's streams; by default all.
        max_new_tokens: at most so many tokens more.
        temperature: 0 is greedy; above 0 samples.
        seed: of the sampling.
        hard_entropy: with shared keys and values: one stream where it predicts with no more entropy than so many nats,
            all streams elsewhere.
    """
    from transformers import TextStreamer

    from parscale.generate import complete
    from parscale.load import load_model, load_tokenizer

    loaded, tokenizer = load_model(model), load_tokenizer(model)
    complete(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        streams=streams,
        hard_entropy=hard_entropy,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),  # the prompt too, once all is checked
    )


def probe(
    model: Model,
    data: tuple[str, ...] = ("stdlib",),
    control: str | None = None,
    sequences: int = 8,
    block_size: int = 256,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Do the streams differ, and are they all used? Correlation, weights, losses and a verdict, on held-out text.

    Args:
        model: a folder or a hub name of a model with streams.
        data: text, of which the held-out part is read.
        control: a model to measure the streams' errors against: best, P=1 with a prefix.
        sequences: how many sequences to look at.
        block_size: tokens in each.
        plot: draw all of it to this .png, .svg or .pdf.
        json: print JSON instead of a table.
    """
    from parscale.probe import probe_model

    probe_model(model, data=data, control=control, sequences=sequences, block_size=block_size, as_json=json, plot=plot)


def cost(
    model: str = "1.6B",
    streams: tuple[int, ...] = (1, 2, 4, 8),
    batch: tuple[int, ...] = (1,),
    in_tokens: Annotated[int, tyro.conf.arg(name="in")] = 64,
    out_tokens: Annotated[int, tyro.conf.arg(name="out")] = 64,
    hardware: str | None = None,
    dtype: Literal["fp32", "bf16", "fp16", "int8", "int4"] = "bf16",
    kv: Literal["own", "shared"] = "own",
    accounting: Literal["released", "counted"] | None = None,
    prefix_tokens: int = 48,
    flops_efficiency: float = 0.7,
    bandwidth_efficiency: float = 0.9,
    measure: bool = False,
    repeats: int = 5,
    layers: int | None = None,
    json: bool = False,
) -> None:
    """Memory and latency of a request, derived by roofline: weights, KV cache, activations, aggregation head; prefill
    and decode. Or measured here, beside the derived. docs/cost.md states every formula.

    Args:
        model: a size of the paper (0.5B, 0.7B, 1.1B, 1.6B, 2.8B, 4.4B), a config.json, a folder, or a hub name.
        streams: P.
        batch: requests at once.
        in_tokens: prompt tokens.
        out_tokens: tokens generated.
        hardware: a100-80g, h100, h200, rtx4090, l4, m3-max, cpu, or a JSON file with flops, bandwidth, memory; by
            default a100-80g, and with --measure this machine.
        dtype: of the weights; int8 and int4 compute in 16 bits.
        kv: every stream has its own keys and values, or one stream's are shared by all.
        accounting: released reproduces the paper's analysis, the default; counted is what this library's forward does,
            the default with --measure.
        prefix_tokens: of every stream when there are several.
        flops_efficiency: share of the peak FLOP/s that is reached.
        bandwidth_efficiency: share of the peak bandwidth that is reached.
        measure: run random weights of this shape here, and measure the machine's floors in the same run.
        repeats: with --measure, rounds that every case is run in.
        layers: with --measure, build so many layers only; measured and derived are then both of those.
        json: print JSON: params, streams, batch, in, out, memory_gib, latency_s, and the parts of both.
    """
    from parscale.cost.model import Workload
    from parscale.cost.report import report_costs, report_measured

    if layers is not None and not measure:
        raise InputError(f"layers is {layers} without --measure: derived costs are those of the whole model")

    workload = Workload(
        input=in_tokens,
        output=out_tokens,
        prefix_tokens=prefix_tokens,
        dtype=dtype,
        kv=kv,
        accounting=accounting or ("counted" if measure else "released"),
        flops_efficiency=flops_efficiency,
        bandwidth_efficiency=bandwidth_efficiency,
    )
    if measure:
        report_measured(model, streams, batch, workload, hardware, json, repeats, layers)
    else:
        report_costs(model, streams, batch, workload, hardware or "a100-80g", json)


def serve(
    model: Model,
    host: str = "127.0.0.1",
    port: int = 8000,
    streams: int | None = None,
    api_key: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits(),  # noqa: B008 (frozen)
) -> None:
    """Serve a model under OpenAI's interface, until SIGTERM or Ctrl-C; answers under way are finished. docs/deploy.md

    Args:
        model: a folder or a hub name, with or without streams; safetensors only, no remote code.
        host: the address to listen on; 0.0.0.0 for other machines too.
        port: 0 takes a free one. The first line printed tells it.
        streams: p of requests that name none; by default all.
        api_key: what clients must send; by default the environment variable PARSCALE_API_KEY, which others do not see.
        dtype: of the weights; auto is the checkpoint's.
        limits: what one request may ask (its fields are flags of their own).
    """
    from parscale.serve.server import serve as run

    run(model, host=host, port=port, streams=streams, api_key=api_key, dtype=dtype, limits=limits)


def export(
    model: Model,
    out: Path,
    to: Literal["onnx", "openvino"],
    weights: Literal["float32", "int8", "int4"] = "float32",
    streams: int | None = None,
    data: tuple[str, ...] = (),
    sequences: int = 8,
    block_size: int = 256,
    json: bool = False,
) -> None:
    """Write a model as one graph for ONNX Runtime GenAI or OpenVINO GenAI, with the streams inside. docs/export.md

    Args:
        model: a folder or a hub name, with or without streams (qwen2, qwen3, llama, mistral).
        out: folder to write; it must not hold anything yet.
        to: the engine.
        weights: of the linear layers and the LM head.
        streams: write this many of the model's streams; by default all. A graph's P is fixed.
        data: text, on whose held-out part the perplexity in float32 and that of what was written are measured;
            "stdlib" is this Python's own standard library. By default none.
        sequences: how many sequences of it, at most.
        block_size: tokens in each.
        json: print JSON instead of text.
    """
    from parscale.export.run import export_model, report_export

    options = {"streams": streams, "data": data, "sequences": sequences, "block_size": block_size}
    report_export(export_model(model, out, engine=to, weights=weights, **options), json)


def merge_first(model: Model, out: Path) -> None:
    """Merge the first stream's LoRA into the weights, the others' becoming differences to it: the same predictions, and
    with shared keys and values a prompt costs what it costs the plain model. docs/shared-kv.md

    Args:
        model: a folder or a hub name of a model with a LoRA for each stream.
        out: folder to write; it must not hold anything yet.
    """
    from parscale.merge_folder import merge_folder

    print(merge_folder(model, out))


_RECIPE = "pretrain, retrofit, frozen or sft, or a YAML file: values for the flags below, which win over it."

VERBS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "generate": generate,
    "probe": probe,
    "law": law_verbs.law,
    "cost": cost,
    "plan": law_verbs.plan,
    "merge-first": merge_first,
    "export": export,
    "serve": serve,
    "experiment": experiment_verbs.experiment,
    "report": experiment_verbs.report,
    "eval": experiment_verbs.evaluate,
    "pilot": experiment_verbs.pilot,
}


def _train_verb(argv: list[str]) -> Callable[..., None]:
    """`train`, whose flags have the values of the recipe that `argv` names as their defaults."""
    from parscale.train.config import NOT_GIVEN, TrainConfig

    # The flags' defaults must be there before they are parsed, so the recipe's name is looked up first, by itself.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe", nargs="?")
    name = finder.parse_known_args(argv)[0].recipe if argv[:1] == ["train"] else None
    settings: dict[str, Any] = {}
    if name is not None:
        from parscale.train.recipes import read_recipe

        settings = read_recipe(name)
    defaults = TrainConfig(**{"stage": tyro.MISSING, "output": tyro.MISSING} | settings)

    def train(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = defaults,
        recipe: Annotated[str | None, tyro.conf.arg(help=_RECIPE)] = None,
    ) -> None:
        from parscale.train.report import run

        # its flags make an object of their own, whether or not one of them was given
        run(config if "streams" in settings or _tells_streams(argv) else replace(config, streams=NOT_GIVEN))

    train.__doc__ = "One training run: pretrain, retrofit, frozen or sft. docs/train.md"
    return train


def _tells_streams(argv: list[str]) -> bool:
    """Whether a flag of the streams is among the arguments."""
    flags = {prefix + field.name for field in fields(StreamsConfig) for prefix in ("", "no_")}
    given = (word.partition("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--"))
    return any(name in flags for name in given)


_DESCRIPTION = "Parallel streams for causal language models. --version alone prints the versions at work."


def _versions() -> str:
    """What a report of a fault has to name."""
    named = ", ".join(f"{name} {version(name)}" for name in ("parscale", "torch", "transformers"))
    return f"{named}, Python {platform.python_version()}"


CLOSED_PIPE = 128 + 13
"""Exit status where the reader of the output has gone: a shell reports it of a process that SIGPIPE has killed."""


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns 0; 2 with one line on stderr when the input is at fault; 130 when interrupted; 141, without
    a word, when the reader of its output has gone."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError as error:
        if reader_is_gone():
            return CLOSED_PIPE
        print(f"parscale: {error}", file=sys.stderr)  # another pipe, or a socket
        return 2
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich ends the process so
            return CLOSED_PIPE
        raise
    finally:
        drop_unwritten()


def _run(arguments: list[str]) -> int:
    # transformers' bars and notices are for its own developers; a verb has its own bar and says what matters.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        try:
            if arguments == ["--version"]:
                print(_versions())
            else:
                verbs = {"train": _train_verb(arguments)} | VERBS
                parse(verbs, arguments, prog="parscale", description=_DESCRIPTION)()
        finally:
            flush_output()
    except BrokenPipeError:
        raise
    except (InputError, OSError) as error:
        print(f"parscale: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("parscale: interrupted", file=sys.stderr)
        return 130
    return 0
