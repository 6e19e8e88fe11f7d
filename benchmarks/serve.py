"""Throughput and latency of `parscale serve` under 1, 4, 16 and 64 clients on loopback, at P = 1 and 4.

    python benchmarks/serve.py                    # a model of 4.7 M parameters beside its embeddings, random weights
    python benchmarks/serve.py --shape pico       # the demo's size: what the server itself costs

Each client asks for one answer after another: a prompt of random tokens, no two alike, and as many new tokens as are
asked for. One server answers both P from the same weights; they take turns. The clients run on the same cores.
"""

import argparse
import asyncio
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from record import write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import parscale
from parscale.train.shapes import build


def save_model(folder: Path, shape: str, streams: int) -> None:
    """A model of random weights and a tokenizer of one token a byte, without an end token: no answer ends early."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    model = build(shape, tokenizer, block_size=512).eval()
    parscale.parallelize(model, parscale.StreamsConfig(streams=streams)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


async def load(base: str, streams: int, clients: int, options: Any, seed: int) -> dict[str, Any]:
    """Have `clients` ask for some seconds. The rate counts answers that ended in time; the latency, all of them."""
    draw, seconds, in_time = random.Random(seed), [], 0
    start = time.perf_counter()

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal in_time
        while time.perf_counter() - start < options.seconds:
            prompt = [draw.randrange(256) for _ in range(options.prompt)]
            body = {"prompt": prompt, "max_tokens": options.tokens, "temperature": 0, "streams": streams}
            asked = time.perf_counter()
            answer = await http.post("/v1/completions", json=body)
            answer.raise_for_status()
            assert answer.json()["usage"]["completion_tokens"] == options.tokens
            seconds.append(time.perf_counter() - asked)
            in_time += time.perf_counter() - start < options.seconds

    async with httpx.AsyncClient(base_url=base, timeout=600, limits=httpx.Limits(max_connections=clients)) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return {"seconds": seconds, "in_time": in_time}


def row(clients: int, streams: int, rounds: list[dict[str, Any]], options: Any) -> dict[str, Any]:
    """The numbers of one cell of the table."""
    seconds = [one for round_ in rounds for one in round_["seconds"]]
    rate = sum(round_["in_time"] for round_ in rounds) / (options.seconds * len(rounds))
    percentiles = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
    return {
        "clients": clients,
        "streams": streams,
        "answers": len(seconds),
        "answers_per_second": round(rate, 2),
        "tokens_per_second": round(rate * options.tokens, 1),
        **{f"p{p}_ms": round(1e3 * percentiles[p - 1], 1) for p in (50, 95, 99)},
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", default="mini", help="of parscale.train.shapes")
    arguments.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    arguments.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    arguments.add_argument("--prompt", type=int, default=64, help="tokens")
    arguments.add_argument("--tokens", type=int, default=32, help="new tokens of each answer")
    arguments.add_argument("--seconds", type=float, default=10, help="of asking, in each round")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--name", default="serve")
    options = arguments.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), options.shape, max(options.streams))
        command = [sys.executable, "-m", "parscale.cli", "serve", folder, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = re.search(r"at (http://\S+)/v1", server.stdout.readline())
            assert address
            warm = argparse.Namespace(**vars(options) | {"seconds": 1.0})
            for streams in options.streams:
                asyncio.run(load(address[1], streams, max(options.clients), warm, seed=-1))
            for clients in options.clients:
                cells: dict[int, list[dict[str, Any]]] = {streams: [] for streams in options.streams}
                for number in range(options.rounds):
                    for streams in options.streams:
                        seed = hash((clients, streams, number))
                        cells[streams].append(asyncio.run(load(address[1], streams, clients, options, seed)))
                for streams, rounds in cells.items():
                    rows.append(row(clients, streams, rounds, options))
                    print(rows[-1], flush=True)
            server.terminate()
            assert server.wait(timeout=60) == 0
    print(write(options.name, vars(options), rows))


if __name__ == "__main__":
    main()
