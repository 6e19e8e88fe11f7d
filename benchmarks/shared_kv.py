"""Own keys and values, shared ones and the plain model, in one run: prefill, decode, KV cache, training step; and
prompts of four requests that continuous batching packs.

    python benchmarks/shared_kv.py                                                    # 0.54 B, bf16: needs 10 GB
    python benchmarks/shared_kv.py --layers 2 --rounds 3 --prefill 64 --contexts 512  # small, to try it

Own streams have a prefix each (the paper); shared ones a prefix and a LoRA each, the same with the first one's LoRA
merged into the weights, one prefix for all and a LoRA each, as serving engines can hold it, or no prefix and a LoRA
each but for the first, whose cache is the plain model's.
Rows: median, quartiles, and the median over rounds of the ratio to the plain model.
CPU only.
"""

import argparse
import copy
from typing import Any

import torch
from core import shape
from record import interleaved, summary, write
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from worker import Case

from parscale import StreamsConfig, merge_first
from parscale.streams.parallelize import over_its_weights

STREAMS = 8
REQUESTS = 4
PAGE = 16
LORA: Any = ("prefix", "lora")
KINDS = {
    "own": StreamsConfig(STREAMS),
    "own+lora": StreamsConfig(STREAMS, diversify=LORA),
    "shared+lora": StreamsConfig(STREAMS, diversify=LORA, kv="shared"),
    "shared+lora, one prefix": StreamsConfig(STREAMS, diversify=LORA, kv="shared", shared_prefix=True),
    "shared+lora, plain first": StreamsConfig(STREAMS, 0, diversify=("lora",), kv="shared", plain_first=True),
}

MERGED = "shared+lora, merged"


def models(layers: int, dtype: torch.dtype) -> dict[str, Any]:
    """Kind → model; all over the same weights, which only the merged one copies."""
    plain = AutoModelForCausalLM.from_config(shape(layers), dtype=dtype).eval()
    built = {"plain": plain} | {kind: over_its_weights(plain, config) for kind, config in KINDS.items()}
    return built | {MERGED: merge_first(copy.deepcopy(built["shared+lora"]))}


def streamed(built: dict[str, Any]) -> list[str]:
    """All kinds but the plain model."""
    return [kind for kind in built if kind != "plain"]


def generation(options: argparse.Namespace, built: dict[str, Any]) -> list[dict[str, Any]]:
    """Prefill by prompt length, then one token on a cache of each length."""
    cases = {"plain": Case(built["plain"])}
    for kind in streamed(built):
        cases |= {f"{kind} P={p}": Case(built[kind], p) for p in (1, STREAMS)}
    rows: list[dict[str, Any]] = []
    for tokens in options.prefill:
        runs = {
            name: (lambda case=case, n=tokens: case.prefill(n)) for name, case in cases.items() if "P=1" not in name
        }
        rounds = max(3, min(options.rounds, options.rounds * 256 // tokens))
        rows += _timed({"phase": "prefill", "tokens": tokens}, runs, rounds)
    for context in options.contexts:
        found: dict[str, dict[str, Any]] = {}
        for name, case in cases.items():  # one at a time: eight own caches of 16k tokens are 2.4 GB
            case.fill(context, static=True)
            keys, values = case.cache.layers[0].keys, case.cache.layers[0].values
            size = (keys.nbytes + values.nbytes) * len(case.cache.layers)
            times = interleaved({name: case.decode}, options.rounds)[name]
            found[name] = {"times": times, "cache_mb": round(size / 1e6, 1)}
            case.prefill(2)  # lets go of the long cache
        for name, one in found.items():
            row = {"phase": "decode", "context": context, "case": name, "cache_mb": one["cache_mb"]}
            rows.append(row | summary(one["times"], found["plain"]["times"]))
            print(rows[-1], flush=True)
    return rows


def batched(options: argparse.Namespace, built: dict[str, Any]) -> list[dict[str, Any]]:
    """The first token of four requests at once, by prompt length."""
    rows: list[dict[str, Any]] = []
    for kind in streamed(built):
        built[kind].set_streams(STREAMS)
    for tokens in options.batched:
        runs = {
            kind: (lambda model=model, n=tokens: first_tokens(model, n, options.step)) for kind, model in built.items()
        }
        rows += _timed({"phase": "batched", "requests": REQUESTS, "tokens": tokens}, runs, options.rounds)
    return rows


def first_tokens(model: Any, tokens: int, step: int) -> None:
    """Have a new batching manager answer four prompts of random tokens, of which no two begin alike, with one each."""
    prompts = torch.randint(shape(1).vocab_size, (REQUESTS, tokens)).tolist()
    blocks = REQUESTS * (tokens // PAGE + 2)
    made = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=step, page_size=PAGE),
        progress_bar=False,
    )
    assert [result.error for result in made.values()] == [None] * REQUESTS


def training(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and backward over a sequence, everything training, float32; fewer layers, for their gradients."""
    built = models(options.train_layers, torch.float32)
    ids = torch.randint(shape(1).vocab_size, (1, options.train_tokens))

    def run(model: Any, streams: int | None) -> None:
        if streams:
            model.set_streams(streams)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()  # here, so that the waiting cases hold no gradients

    runs = {"plain": lambda: run(built["plain"], None)}
    for kind in streamed(built):
        runs |= {f"{kind} P={p}": (lambda k=kind, p=p: run(built[k], p)) for p in (4, STREAMS)}
    about = {"phase": "training", "tokens": options.train_tokens, "layers": options.train_layers}
    return _timed(about, runs, options.rounds)


def _timed(about: dict[str, Any], runs: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    times = interleaved(runs, rounds, warmup=1)
    rows = [about | {"case": name} | summary(seconds, times["plain"]) for name, seconds in times.items()]
    print(*rows, sep="\n", flush=True)
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--layers", type=int, default=36)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--prefill", type=int, nargs="*", default=[64, 256, 1024])
    arguments.add_argument("--batched", type=int, nargs="*", default=[256])
    arguments.add_argument("--step", type=int, default=512, help="tokens that continuous batching packs into a step")
    arguments.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="but for training")
    arguments.add_argument("--contexts", type=int, nargs="*", default=[256, 4096, 16384])
    arguments.add_argument("--train-layers", type=int, default=4)
    arguments.add_argument("--train-tokens", type=int, default=256)
    arguments.add_argument("--name", default="shared_kv")
    options = arguments.parse_args()
    torch.manual_seed(0)
    rows = training(options)
    with torch.no_grad():
        built = models(options.layers, getattr(torch, options.dtype))
        rows += generation(options, built) + batched(options, built)
    print(write(options.name, vars(options), rows))


if __name__ == "__main__":
    main()
