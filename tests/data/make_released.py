"""Makes the tiny checkpoints in the released format beside this file, each with outputs of a naive reference.

    python tests/data/make_released.py

Weights come from NumPy's seeded generator. The reference reads the stored numbers back and does the arithmetic of the
paper in float64, one stream at a time, one sequence at a time, nothing cached: it imports neither transformers' models
nor parscale. Configs are spelled as older versions of transformers wrote them.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Array = np.ndarray
Weights = dict[str, Array]

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD = 24, 8, 12, 2, 2, 1, 4
THETA, NORM_EPSILON = 500.0, 1e-6
NEW_TOKENS, BEAMS = 8, 3
MARGIN = 1e-3  # nats between the best token and the next, so that float32 decides as float64 does


@dataclass(frozen=True)
class Case:
    """One checkpoint: P, n, ε, how it is stored."""

    name: str
    seed: int
    streams: int
    tokens: int
    smoothing: float
    tied: bool
    dtype: str = "float32"
    shards: int = 1


CASES = (
    Case("p1_tied", seed=2, streams=1, tokens=48, smoothing=0.01, tied=True),
    Case("p2_n3_untied", seed=3, streams=2, tokens=3, smoothing=0.1, tied=False),
    Case("p4_n48_bf16_sharded", seed=5, streams=4, tokens=48, smoothing=0.01, tied=True, dtype="bfloat16", shards=3),
)


def make(case: Case, directory: Path) -> None:
    """Write `config.json`, the safetensors file or shards, and `reference.safetensors`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(case), indent=1) + "\n")
    dtype = getattr(torch, case.dtype)
    stored = {name: torch.tensor(values).to(dtype) for name, values in draw_weights(case).items()}
    if case.shards == 1:
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        _save_shards(stored, case.shards, directory)
    weights = {name: tensor.double().numpy() for name, tensor in stored.items()}
    save_file(outputs(case, weights), directory / "reference.safetensors")


def config(case: Case) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ParScaleForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_qwen2_parscale.Qwen2ParScaleConfig",
            "AutoModelForCausalLM": "modeling_qwen2_parscale.Qwen2ParScaleForCausalLM",
        },
        "bos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "max_position_embeddings": 64,
        "max_window_layers": 28,
        "model_type": "qwen2_parscale",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "pad_token_id": 0,
        "parscale_attn_smooth": case.smoothing,
        "parscale_n": case.streams,
        "parscale_n_tokens": case.tokens,
        "rms_norm_eps": NORM_EPSILON,
        "rope_scaling": None,
        "rope_theta": THETA,
        "sliding_window": None,
        "tie_word_embeddings": case.tied,
        "torch_dtype": case.dtype,
        "transformers_version": "4.53.3",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
    }


def draw_weights(case: Case) -> Weights:
    """Random numbers under the released names."""
    draw = np.random.default_rng(case.seed)

    def matrix(rows: int, columns: int) -> Array:
        return draw.normal(scale=2.5 * columns**-0.5, size=(rows, columns))

    weights = {"model.embed_tokens.weight": draw.normal(scale=0.4, size=(VOCABULARY, HIDDEN))}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"{block}.self_attn.{name}_proj.weight"] = matrix(heads * HEAD, HIDDEN)
            weights[f"{block}.self_attn.{name}_proj.bias"] = draw.normal(scale=0.3, size=heads * HEAD)
        weights[f"{block}.self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD)
        if case.streams > 1:
            for name in ("prefix_k", "prefix_v"):
                weights[f"{block}.self_attn.{name}"] = draw.normal(size=(case.streams, KV_HEADS, case.tokens, HEAD))
        weights[f"{block}.mlp.gate_proj.weight"] = matrix(INNER, HIDDEN)
        weights[f"{block}.mlp.up_proj.weight"] = matrix(INNER, HIDDEN)
        weights[f"{block}.mlp.down_proj.weight"] = matrix(HIDDEN, INNER)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{block}.{norm}.weight"] = 1 + 0.2 * draw.normal(size=HIDDEN)
    weights["model.norm.weight"] = 1 + 0.2 * draw.normal(size=HIDDEN)
    if case.streams > 1:
        weights["model.aggregate_layer.0.weight"] = matrix(HIDDEN, case.streams * HIDDEN)
        weights["model.aggregate_layer.0.bias"] = draw.normal(size=HIDDEN)
        weights["model.aggregate_layer.2.weight"] = matrix(case.streams, HIDDEN)
        weights["model.aggregate_layer.2.bias"] = draw.normal(size=case.streams)
    if not case.tied:
        weights["lm_head.weight"] = draw.normal(scale=0.4, size=(VOCABULARY, HIDDEN))
    return weights


def outputs(case: Case, weights: Weights) -> dict[str, torch.Tensor]:
    """Three prompts of one length, and the same cut to three lengths, which a batch pads on the left."""
    draw = np.random.default_rng(100 + case.seed)
    ids = draw.integers(2, VOCABULARY, size=(3, 9))
    lengths = np.array([9, 6, 4])
    cut = [row[-length:] for row, length in zip(ids, lengths, strict=True)]
    made = {
        "input_ids": ids,
        "lengths": lengths,
        "logits": np.stack([logits(case, weights, row) for row in ids]),
        "greedy": np.stack([greedy(case, weights, row) for row in ids]),
        "greedy_cut": np.stack([greedy(case, weights, row)[-NEW_TOKENS:] for row in cut]),
        "beam": np.stack([beam(case, weights, row) for row in ids]),
    }
    return {name: torch.tensor(values) for name, values in made.items()}


def greedy(case: Case, weights: Weights, prompt: Array) -> Array:
    """The prompt and `NEW_TOKENS` tokens more, each the likeliest."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        last = logits(case, weights, np.array(tokens))[-1]
        best, second = np.sort(last)[[-1, -2]]
        assert best - second > MARGIN, f"{case.name}: choose another seed, the choice is too close"
        tokens.append(int(last.argmax()))
    return np.array(tokens)


def beam(case: Case, weights: Weights, prompt: Array) -> Array:
    """The likeliest sequence when the `BEAMS` likeliest are kept at every step."""
    kept = [(0.0, list(prompt))]
    for _ in range(NEW_TOKENS):
        grown = []
        for score, tokens in kept:
            last = logits(case, weights, np.array(tokens))[-1]
            log_p = last - last.max() - np.log(np.exp(last - last.max()).sum())
            grown += [(score + p, [*tokens, token]) for token, p in enumerate(log_p)]
        grown.sort(key=lambda pair: pair[0], reverse=True)
        assert grown[BEAMS - 1][0] - grown[BEAMS][0] > MARGIN, f"{case.name}: choose another seed"
        kept = grown[:BEAMS]
    return np.array(kept[0][1])


def logits(case: Case, weights: Weights, tokens: Array) -> Array:
    """(T,) token ids → (T, V)."""
    hidden = np.stack([_one_stream(weights, tokens, p if case.streams > 1 else None) for p in range(case.streams)])
    if case.streams == 1:
        merged = hidden[0]
    else:
        x = hidden.transpose(1, 2, 0).reshape(len(tokens), -1)  # (T, d·P): hidden-major, stream-minor
        x = x @ weights["model.aggregate_layer.0.weight"].T + weights["model.aggregate_layer.0.bias"]
        x = x / (1 + np.exp(-x))
        x = x @ weights["model.aggregate_layer.2.weight"].T + weights["model.aggregate_layer.2.bias"]
        share = _softmax(x) * (1 - case.smoothing) + case.smoothing / case.streams  # (T, P)
        merged = np.einsum("tp,ptd->td", share, hidden)
    return merged @ weights["model.embed_tokens.weight" if case.tied else "lm_head.weight"].T


def _one_stream(weights: Weights, tokens: Array, stream: int | None) -> Array:
    """Qwen2's decoder with one stream's prefix in front of every attention: (T,) → (T, d)."""
    x = weights["model.embed_tokens.weight"][tokens]
    angles = np.arange(len(tokens))[:, None] / THETA ** (np.arange(0, HEAD, 2) / HEAD)  # (T, D/2)
    angles = angles.astype(x.dtype)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        attention = f"{block}.self_attn"
        h = _norm(x, weights[f"{block}.input_layernorm.weight"])
        q, k, v = (
            (h @ weights[f"{attention}.{name}_proj.weight"].T + weights[f"{attention}.{name}_proj.bias"])
            .reshape(len(tokens), -1, HEAD)
            .transpose(1, 0, 2)
            for name in "qkv"
        )
        q, k = _rotate(q, angles), _rotate(k, angles)  # (H, T, D)
        seen = np.tril(np.ones((len(tokens), len(tokens)), bool))
        if stream is not None:
            k = np.concatenate([weights[f"{attention}.prefix_k"][stream], k], axis=1)
            v = np.concatenate([weights[f"{attention}.prefix_v"][stream], v], axis=1)
            seen = np.concatenate([np.ones((len(tokens), k.shape[1] - len(tokens)), bool), seen], axis=1)
        k, v = (np.repeat(z, HEADS // KV_HEADS, axis=0) for z in (k, v))
        scores = np.where(seen, q @ k.transpose(0, 2, 1) / HEAD**0.5, -np.inf)
        mixed = (_softmax(scores) @ v).transpose(1, 0, 2).reshape(len(tokens), -1)
        x = x + mixed @ weights[f"{attention}.o_proj.weight"].T
        h = _norm(x, weights[f"{block}.post_attention_layernorm.weight"])
        gate = h @ weights[f"{block}.mlp.gate_proj.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (h @ weights[f"{block}.mlp.up_proj.weight"].T)
        x = x + inner @ weights[f"{block}.mlp.down_proj.weight"].T
    return _norm(x, weights["model.norm.weight"])


def _norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPSILON) * weight


def _rotate(x: Array, angles: Array) -> Array:
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _softmax(x: Array) -> Array:
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def _save_shards(tensors: dict[str, torch.Tensor], shards: int, directory: Path) -> None:
    names = sorted(tensors)
    files = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def stored_weights(directory: Path) -> Weights:
    """What a checkpoint's files hold, in float64. In float32 (`astype`) the reference computes in float32."""
    tensors = {}
    for file in sorted(directory.glob("model*.safetensors")):
        tensors |= load_file(file)
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


if __name__ == "__main__":
    for one in CASES:
        make(one, Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "released") / one.name)
