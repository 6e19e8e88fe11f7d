"""Models that an experiment trains and `train.shapes` does not name: "LAYERSxHIDDENxHEADS", "…eEXPERTS" if sparse.

A sparse model has as many active parameters as the dense one: each expert is half as wide, and two run for a token.
"""

import json
import re
from pathlib import Path
from typing import Any

from parscale.cost.model import PAPER_SHAPES
from parscale.errors import InputError
from parscale.train.shapes import SHAPES
from parscale.utils.files import write_text

_PATTERN = re.compile(r"(\d+)x(\d+)x(\d+)(?:e(\d+))?")
H100_FLOPS, UTILISATION = 989e12, 0.4
"""Peak of dense 16-bit products of the GPU whose hours are told, and the share of it that training reaches."""


def source_of(model: str, vocab_size: int, work: Path) -> str:
    """What `parscale train --model` takes for a shape: its name, or a folder with its configuration, under `work`.

    Raises:
        InputError: no such shape.
    """
    if model in SHAPES:
        return model
    folder = work / "shapes" / f"{model}-{vocab_size}"
    write_text(folder / "config.json", json.dumps(configuration(model, vocab_size)))
    return str(folder)


def layers_and_width(model: str) -> tuple[int, int] | None:
    """Of a shape; None for a size of the paper."""
    if model in SHAPES:
        return SHAPES[model][:2]
    found = _PATTERN.fullmatch(model)
    return (int(found[1]), int(found[2])) if found else None


def hidden_size(model: str) -> int | None:
    """The width of a shape; None for a size of the paper."""
    found = layers_and_width(model)
    return found[1] if found else None


def configuration(model: str, vocab_size: int) -> dict[str, Any]:
    """`config.json` of a shape: qwen2, or qwen3_moe for a sparse one."""
    found = _PATTERN.fullmatch(model)
    if not found:
        raise InputError(f"model {model!r} is no shape: give one of {tuple(SHAPES)} or LAYERSxHIDDENxHEADS")
    layers, hidden, heads = (int(found[i]) for i in (1, 2, 3))
    width = 8 * hidden // 3 // 8 * 8
    common = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "initializer_range": 0.5 * hidden**-0.5,
        "tie_word_embeddings": True,
    }
    if found[4] is None:
        return common | {"model_type": "qwen2"}
    return common | {
        "model_type": "qwen3_moe",
        "head_dim": hidden // heads,
        "num_experts": int(found[4]),
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width // 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    }


def gpu_hours(run: Any) -> float:
    """Hours of one H100 that a run of the paper's scale needs: 6·N·P·D operations at 40 % of the peak, without those of
    the model that it continues. N are the parameters without the embedding, D the training tokens."""
    n = PAPER_SHAPES[run.model].params(run.streams.streams, run.streams.prefix_tokens)
    return 6 * n * run.streams.streams * run.tokens / (H100_FLOPS * UTILISATION) / 3600
