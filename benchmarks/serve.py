"""Throughput and latency of `parscale serve` under 1, 4, 16 and 64 clients on loopback, at P = 1 and 4.

    python benchmarks/serve.py                    # a model of 4.7 M parameters beside its embeddings, random weights
    python benchmarks/serve.py --shape pico       # the demo's size: what the server itself costs

Each client asks for one answer after another: a prompt of random tokens, no two alike, and as many new tokens as are
asked for. One server answers both P from the same weights; they take turns. The clients run on the same cores.
Afterwards some answers of each row are compared with what `generate` says to the same prompts without a server.
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
from parscale.load import load_model, load_tokenizer
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
    """Have `clients` ask for some seconds, one answer after another, and wait for the last ones."""
    draw, seconds, told = random.Random(seed), [], []
    start = time.perf_counter()

    async def client(http: httpx.AsyncClient) -> None:
        while time.perf_counter() - start < options.seconds:
            prompt = [draw.randrange(256) for _ in range(options.prompt)]
            body = {"prompt": prompt, "max_tokens": options.tokens, "temperature": 0, "streams": streams}
            asked = time.perf_counter()
            answer = await http.post("/v1/completions", json=body)
            answer.raise_for_status()
            assert answer.json()["usage"]["completion_tokens"] == options.tokens
            seconds.append(time.perf_counter() - asked)
            told.append((prompt, answer.json()["choices"][0]["text"]))

    async with httpx.AsyncClient(base_url=base, timeout=600, limits=httpx.Limits(max_connections=clients)) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return {"seconds": seconds, "wall": time.perf_counter() - start, "told": told}


def same_offline(folder: Path, streams: int, told: list[tuple[list[int], str]], tokens: int) -> int:
    """How many answers are the greedy ones of the model alone, in batches of prompts of one length."""
    model, tokenizer = load_model(folder, dtype=torch.float32).eval(), load_tokenizer(folder)
    model.set_streams(streams)
    same = 0
    for first in range(0, len(told), 64):
        ids = torch.tensor([prompt for prompt, _ in told[first : first + 64]])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        texts = tokenizer.batch_decode(made[:, ids.shape[1] :])
        same += sum(text == heard for text, (_, heard) in zip(texts, told[first : first + 64], strict=True))
    return same


def row(clients: int, streams: int, rounds: list[dict[str, Any]], options: Any) -> dict[str, Any]:
    """The numbers of one cell of the table. The rate is of all answers, over the time until the last one ended."""
    seconds = [one for round_ in rounds for one in round_["seconds"]]
    rate = len(seconds) / sum(round_["wall"] for round_ in rounds)
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
    arguments.add_argument("--seconds", type=float, default=6, help="of asking, in each round")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--checked", type=int, default=192, help="answers of each row to compare, at most")
    arguments.add_argument("--name", default="serve")
    options = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    told: list[list[tuple[list[int], str]]] = []
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
                    told.append([one for round_ in rounds for one in round_["told"]][: options.checked])
                    print(rows[-1], flush=True)
            server.terminate()
            assert server.wait(timeout=60) == 0
        for one, answers in zip(rows, told, strict=True):
            same = same_offline(Path(folder), one["streams"], answers, options.tokens)
            one |= {"checked": len(answers), "as_without_server": same}
    print(write(options.name, vars(options), rows))


if __name__ == "__main__":
    main()
