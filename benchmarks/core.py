"""Prefill and decode at P = 1, 2, 4, 8 beside a plain model of the same shape, in one run.

    python benchmarks/core.py                # the 0.54 B shape in bf16: needs 4 GB
    python benchmarks/core.py --layers 2     # small, to try it

One set of random weights serves every P through `set_streams`. "P=1" is one stream with its prefix and no head;
"P=1, no prefix" is what the released format means by P=1.
"""

import argparse
import copy
from typing import Any

import torch
from record import interleaved, summary, write
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config

import parscale


def shape(layers: int) -> Qwen2Config:
    """The 0.54 B shape of the paper's sizes, with a vocabulary of 32000."""
    return Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=32000,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    )


class Case:
    """One model at one P: prefill of a prompt, and one more token on a cache that holds it."""

    def __init__(self, model: Any, streams: int, prompt: torch.Tensor) -> None:
        self.model, self.streams, self.prompt = model, streams, prompt
        self.cache: Any = None

    def prefill(self) -> None:
        self._set()
        self.cache = DynamicCache(config=self.model.config)
        self.model(input_ids=self.prompt, past_key_values=self.cache, logits_to_keep=1)

    def decode(self) -> None:
        self._set()
        self.model(input_ids=self.prompt[:, :1], past_key_values=self.cache)

    def _set(self) -> None:
        if self.streams:
            self.model.set_streams(self.streams)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--layers", type=int, default=36)
    arguments.add_argument("--prompt", type=int, default=256, help="tokens")
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=15, help="decode steps timed; a third as many prefills")
    arguments.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments.add_argument("--name", default="core")
    options = arguments.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    build = {"dtype": getattr(torch, options.dtype)}
    plain = AutoModelForCausalLM.from_config(shape(options.layers), **build).to(device).eval()
    streamed = AutoModelForCausalLM.from_config(shape(options.layers), **build).to(device).eval()
    streamed.load_state_dict(plain.state_dict())
    parscale.parallelize(streamed, parscale.StreamsConfig(streams=8))
    bare = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
    parscale.parallelize(bare, parscale.StreamsConfig(streams=1, prefix_tokens=0))
    prompt = torch.randint(0, 32000, (options.batch, options.prompt), device=device)
    cases = {"plain": Case(plain, 0, prompt), "P=1, no prefix": Case(bare, 1, prompt)} | {
        f"P={p}": Case(streamed, p, prompt) for p in (1, 2, 4, 8)
    }
    rows = []
    with torch.no_grad():
        for phase, rounds in (("prefill", max(3, options.rounds // 3)), ("decode", options.rounds)):
            times = interleaved({name: getattr(case, phase) for name, case in cases.items()}, rounds)
            for name, seconds in times.items():
                rows.append({"phase": phase, "case": name} | summary(seconds, times["plain"]))
                print(rows[-1], flush=True)
    print(write(options.name, vars(options), rows))


if __name__ == "__main__":
    main()
