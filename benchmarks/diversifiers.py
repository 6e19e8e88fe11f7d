"""What each way to tell streams apart costs: parameters, KV cache, and time of prefill, decode and a training step.

    python benchmarks/diversifiers.py

The weights are random, of the 0.54 B shape with fewer layers and a small vocabulary, whose cost would hide theirs.
Ratios are to "embedding", which adds a vector to the token embeddings and nothing to any layer; "plain" is the model
without streams.
"""

import argparse
from typing import Any

import torch
from core import shape
from record import interleaved, summary, write
from transformers import AutoModelForCausalLM, DynamicCache

import parscale
from parscale.streams.tensors import belongs_to_streams

VOCABULARY = 2048
CASES = {
    "plain": (),
    "embedding": ("embedding",),
    "prefix": ("prefix",),
    "lora": ("lora",),
    "rank1": ("rank1",),
    "all": ("prefix", "embedding", "lora", "rank1"),
}


class Case:
    """One model: prefill of a prompt, one more token on the cache that holds it, and forward with backward."""

    def __init__(self, model: Any, prompt: torch.Tensor) -> None:
        self.model, self.prompt = model, prompt
        self.cache: Any = None

    @torch.inference_mode()
    def prefill(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.model(input_ids=self.prompt, past_key_values=self.cache, logits_to_keep=1)

    @torch.inference_mode()
    def decode(self) -> None:
        self.model(input_ids=self.prompt[:, :1], past_key_values=self.cache)

    def train(self) -> None:
        self.model(input_ids=self.prompt, labels=self.prompt, use_cache=False).loss.backward()
        self.model.zero_grad()  # here, so that the waiting cases hold no gradients

    def sizes(self) -> dict[str, float]:
        """Parameters that tell the streams apart, and what the KV cache takes for each token."""
        self.prefill()
        layers = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        return {
            "parameters": sum(
                parameter.numel()
                for name, parameter in self.model.named_parameters()
                if belongs_to_streams(name) and "aggregate_layer" not in name
            ),
            "cache_bytes_per_token": sum(tensor.nbytes for tensor in layers) / self.prompt.numel(),
        }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--streams", type=int, default=4)
    arguments.add_argument("--lora-rank", type=int, default=8)
    arguments.add_argument("--prompt", type=int, default=128, help="tokens")
    arguments.add_argument("--rounds", type=int, default=30, help="decode steps timed; a third as many of the others")
    arguments.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    arguments.add_argument("--name", default="diversifiers")
    options = arguments.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompt = torch.randint(0, VOCABULARY, (1, options.prompt), device=device)
    cases = {}
    for name, diversify in CASES.items():
        config = shape(options.layers)
        config.vocab_size = VOCABULARY
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).to(device)
        if diversify:
            settings: Any = {"diversify": diversify, "lora_rank": options.lora_rank}
            parscale.parallelize(model, parscale.StreamsConfig(options.streams, **settings))
        cases[name] = Case(model.eval(), prompt)
    rows: list[dict[str, Any]] = [{"case": name} | case.sizes() for name, case in cases.items()]
    for phase, rounds in (("prefill", options.rounds // 3), ("decode", options.rounds), ("train", options.rounds // 3)):
        times = interleaved({name: getattr(case, phase) for name, case in cases.items()}, rounds)
        for name, seconds in times.items():
            rows.append({"phase": phase, "case": name} | summary(seconds, times["embedding"]))
            print(rows[-1], flush=True)
    print(write(options.name, vars(options), rows))


if __name__ == "__main__":
    main()
