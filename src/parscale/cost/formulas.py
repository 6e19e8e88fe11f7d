"""What a request costs, formula by formula: bytes held, bytes moved, operations done. docs/cost.md derives each.

Two ways of counting. "released" is that of the paper's own analysis and gives its numbers; "counted" is what this
library's forward does. They differ in five places, marked below.

These lines are Python and JavaScript alike (dicts, arithmetic, max, log, if-else expressions, no keywords), because the
planner's page runs them translated word for word. Units: bytes, FLOP, seconds.

    s  shape     hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, untied (0 | 1), bias (0 | 1)
    w  workload  streams, batch, input, output, prefix (tokens), weight, value (bytes an entry), shared (0 | 1: the
                 first stream's keys and values serve all), counted (0 | 1)
    m  machine   flops, bandwidth (both as achieved: peak times efficiency)
"""

from typing import Any


def attention_params(s: Any) -> Any:
    """Query, key, value and output projections of one layer."""
    return s["hidden"] * s["head_dim"] * (2 * s["heads"] + 2 * s["kv_heads"])


def mlp_params(s: Any) -> Any:
    """Gate, up and down projections of one layer."""
    return 3 * s["hidden"] * s["intermediate"]


def small_params(s: Any) -> Any:
    """Norms of all layers, the last norm, and the biases of the query, key and value projections."""
    return s["layers"] * (2 * s["hidden"] + s["bias"] * s["head_dim"] * (s["heads"] + 2 * s["kv_heads"])) + s["hidden"]


def backbone_params(s: Any) -> Any:
    """Non-embedding parameters without streams: the paper's N at P = 1."""
    return s["layers"] * (attention_params(s) + mlp_params(s)) + small_params(s)


def head_params(s: Any, streams: Any) -> Any:
    """The aggregation head: Linear(P·d → d), SiLU, Linear(d → P), with biases. One stream has none."""
    return streams * s["hidden"] * s["hidden"] + s["hidden"] + s["hidden"] * streams + streams if streams > 1 else 0


def prefix_params(s: Any, streams: Any, prefix: Any) -> Any:
    """n key/value pairs in every layer of every stream. The paper's P = 1 has none."""
    return 2 * s["layers"] * streams * prefix * s["kv_heads"] * s["head_dim"] if streams > 1 else 0


def total_params(s: Any, streams: Any, prefix: Any) -> Any:
    """N as the law counts it: backbone, prefixes and aggregation head, no embedding."""
    return backbone_params(s) + prefix_params(s, streams, prefix) + head_params(s, streams)


def kv_params(s: Any) -> Any:
    """The part of attention_params that makes keys and values."""
    return 2 * s["hidden"] * s["head_dim"] * s["kv_heads"]


def memory(s: Any, w: Any) -> Any:
    """Bytes held at once: weights, aggregation head, key/value cache, and the largest activation of the prefill."""
    prefix = w["prefix"] if w["streams"] > 1 else 0
    alone = w["shared"] if w["streams"] > 1 else 0
    rows = w["batch"] * (1 if alone else w["streams"])
    embedding = s["vocab"] * s["hidden"] * (1 + s["untied"])
    weights = w["weight"] * s["layers"] * (attention_params(s) + mlp_params(s)) + w["value"] * (
        small_params(s) + embedding
    )
    position = 2 * s["layers"] * s["kv_heads"] * s["head_dim"] * w["value"]
    # Released: every row holds a copy of its prefix. Counted: one bank a stream, whatever the batch.
    prefixes = w["streams"] * prefix if w["counted"] else rows * prefix
    cache = position * (rows * (w["input"] + w["output"]) + prefixes)
    # Released: the prefix goes through the layers as 48 more tokens, and every prompt position gets logits.
    # Shared: the first stream reads the prompt; the others' last token stands behind it, in the same pass.
    tokens = rows * (w["input"] + (0 if w["counted"] else prefix)) + alone * w["batch"] * (w["streams"] - 1)
    layer = tokens * max(3 * s["heads"] * s["head_dim"], s["hidden"], s["intermediate"])
    logits = s["vocab"] * w["batch"] * (1 if w["counted"] else w["input"] + prefix)
    activations = w["value"] * max(layer, logits)
    head = w["value"] * head_params(s, w["streams"])
    return {
        "weights": weights,
        "aggregation_head": head,
        "kv_cache": cache,
        "activations": activations,
        "total": weights + head + cache + activations,
    }


def layers_seconds(s: Any, w: Any, m: Any, rows: Any, cached: Any, length: Any, scores: Any) -> Any:
    """All layers on `rows` rows of `length` tokens with `scores` query-key pairs a row and head. `cached` of the rows
    have keys and values made for them.

    Attention and MLP each take the longer of computing and of moving weights and activations; the two norms move
    activations in float32.
    """
    tokens = rows * length
    width = s["heads"] * s["head_dim"]
    projected = attention_params(s) * tokens - kv_params(s) * (rows - cached) * length
    attention_flops = 2 * projected + 4 * rows * scores * width
    attention_bytes = w["weight"] * attention_params(s) + w["value"] * tokens * max(
        3 * width, 2 * width + 4 * s["heads"]
    )
    mlp_flops = 2 * mlp_params(s) * tokens
    mlp_bytes = w["weight"] * mlp_params(s) + w["value"] * tokens * max(s["hidden"], s["intermediate"])
    attention = max(attention_flops / m["flops"], attention_bytes / m["bandwidth"])
    mlp = max(mlp_flops / m["flops"], mlp_bytes / m["bandwidth"])
    norms = 2 * 4 * tokens * s["hidden"] / m["bandwidth"]
    return s["layers"] * (attention + mlp + norms)


def embedding_seconds(s: Any, w: Any, m: Any, positions: Any) -> Any:
    """The vocabulary matrix read once, and logits for `positions` positions. Released: one after the other."""
    read = w["value"] * s["vocab"] * s["hidden"] / m["bandwidth"]
    compute = 2 * positions * s["vocab"] * s["hidden"] / m["flops"]
    return max(read, compute) if w["counted"] else read + compute


def head_seconds(s: Any, w: Any, m: Any, positions: Any) -> Any:
    """The aggregation head on `positions` positions: its weights read once."""
    params = head_params(s, w["streams"])
    return max(2 * params * positions / m["flops"], w["value"] * params / m["bandwidth"])


def latency(s: Any, w: Any, m: Any) -> Any:
    """Seconds: the prefill, one decode step (mean over the output), and the whole request."""
    prefix = w["prefix"] if w["streams"] > 1 else 0
    alone = w["shared"] if w["streams"] > 1 else 0
    rows = w["batch"] * w["streams"]
    cached = w["batch"] if alone else rows
    position = 2 * s["layers"] * s["kv_heads"] * s["head_dim"] * w["value"]
    # Shared: the first stream reads the prompt; the others' last token stands behind it, in the same pass.
    tail = alone * (w["streams"] - 1)
    length = w["input"] + tail + (0 if w["counted"] else prefix)
    seen = w["input"] * (prefix + w["input"] / 2) + tail * (prefix + w["input"])
    scores = seen if w["counted"] else length * length
    # Counted: the prompt's keys and values are written, and only its last position gets logits. Released: every
    # prompt position gets logits once, and every prefix position once a stream.
    written = position * cached * w["input"] / m["bandwidth"] if w["counted"] else 0
    logits = w["batch"] * (1 if w["counted"] else w["input"] + (1 if alone else w["streams"]) * prefix)
    prefill = layers_seconds(s, w, m, cached, cached, length, scores) + written + embedding_seconds(s, w, m, logits)
    # Released: each step reads and writes the whole final cache. Counted: reads what is there, writes one position.
    held = w["input"] + (w["output"] + 1) / 2
    moved = cached * (held + 1) + rows * prefix if w["counted"] else 2 * cached * (w["input"] + prefix + w["output"])
    traffic = position * moved / m["bandwidth"]
    layers = layers_seconds(s, w, m, rows, cached, 1, held + prefix if w["counted"] else 1)
    # Released: the head's weights are read once a request. Counted: once in the prefill and once in every step.
    aggregate_prefill = head_seconds(s, w, m, w["batch"] * (1 if w["counted"] else w["input"] + w["output"]))
    aggregate_step = head_seconds(s, w, m, w["batch"]) if w["counted"] else 0
    step = layers + traffic + embedding_seconds(s, w, m, w["batch"]) + aggregate_step
    return {
        "prefill": prefill + aggregate_prefill,
        "decode_step": step,
        "decode": step * w["output"],
        "cache_traffic": traffic,
        "total": prefill + aggregate_prefill + step * w["output"],
    }


def family(hidden: Any) -> Any:
    """The paper's family of shapes at any width: its six models are hidden = 896 … 2560, within 1 % in the MLP."""
    return {
        "hidden": hidden,
        "intermediate": 5.4 * hidden,
        "layers": 36,
        "heads": 16,
        "kv_heads": 2,
        "head_dim": hidden / 16,
        "vocab": 151936,
        "untied": 0,
        "bias": 1,
    }


def family_hidden(params: Any) -> Any:
    """The width of the family's model with `params` backbone parameters: backbone_params is quadratic in the width."""
    square = 36 * (2 * (16 + 2) / 16 + 3 * 5.4)
    linear = 36 * (2 + (16 + 2 * 2) / 16) + 1
    return ((linear * linear + 4 * square * params) ** 0.5 - linear) / (2 * square)


def train_flops(s: Any, streams: Any, tokens: Any) -> Any:
    """FLOP of training on `tokens` tokens: 6 a parameter and token, the backbone P times, both heads once."""
    return 6 * tokens * (streams * backbone_params(s) + head_params(s, streams) + s["vocab"] * s["hidden"])


def two_stage_flops(s: Any, streams: Any, tokens: Any, share: Any) -> Any:
    """FLOP when only the last `share` of the tokens is trained with streams (the paper's two stages: 2 %)."""
    return train_flops(s, 1, tokens * (1 - share)) + train_flops(s, streams, tokens * share)
