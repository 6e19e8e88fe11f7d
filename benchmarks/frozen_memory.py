"""What frozen streams over a quantised backbone need in memory to train, computed: nothing is run.

    python benchmarks/frozen_memory.py            # a 7 B shape; writes results/frozen_memory.json

GiB of one step with gradient checkpointing and the loss taken in chunks, for batch 1:

- backbone: the layers' matrices in 4 bits with a 16-bit scale for 64 of them, the rest in 16 bits;
- trained: prefixes, aggregation head and LoRA factors in 32 bits, and as much three times over for gradient and AdamW;
- kept: the input of every layer for P streams, (P·B·T, d) in 16 bits, which checkpointing keeps;
- layer: what one layer's backward pass holds when it is run again: about 8 d and 5 times the MLP's width a token;
- logits: one chunk of 2^26 in 32 bits and in 16.
"""

import argparse

from record import write

from parscale.cost import formulas
from parscale.cost.model import GIB, Shape
from parscale.output import print_table
from parscale.train.loss import LOGITS_AT_ONCE

# Qwen2.5-7B's config.json
SHAPE = Shape(3584, 18944, layers=28, heads=28, kv_heads=4, head_dim=128, vocab=152064, untied=True)
INT4, HALF, FLOAT = 0.53125, 2, 4  # bytes


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments.add_argument("--tokens", type=int, default=2048, help="in a sequence")
    arguments.add_argument("--prefix-tokens", type=int, default=48)
    arguments.add_argument("--lora-rank", type=int, default=8)
    options = arguments.parse_args()
    rows = [
        {"streams": p} | needs(SHAPE, p, options.tokens, options.prefix_tokens, options.lora_rank)
        for p in options.streams
    ]
    print_table("GiB to train frozen streams over a 7 B backbone in 4 bits, computed", rows)
    print(write("frozen_memory", vars(options) | {"computed": True, "shape": vars(SHAPE)}, rows))


def needs(shape: Shape, streams: int, tokens: int, prefix_tokens: int, lora_rank: int) -> dict[str, float]:
    """GiB by part, and their sum."""
    s = vars(shape)
    matrices = shape.layers * (formulas.attention_params(s) + formulas.mlp_params(s))
    rest = formulas.small_params(s) + shape.vocab * shape.hidden * (1 + shape.untied)
    prefixes = 2 * shape.layers * streams * prefix_tokens * shape.kv_heads * shape.head_dim
    width = shape.head_dim * (shape.heads + 2 * shape.kv_heads) + 2 * shape.intermediate  # q, k, v, gate and up
    lora = shape.layers * streams * lora_rank * (5 * shape.hidden + width)
    trained = prefixes + lora + formulas.head_params(s, streams)
    kept = shape.layers * streams * tokens * shape.hidden * HALF
    layer = streams * tokens * (8 * shape.hidden + 5 * shape.intermediate) * HALF
    parts = {
        "backbone": INT4 * matrices + HALF * rest,
        "trained": 4 * FLOAT * trained,
        "kept": kept,
        "layer": layer,
        "logits": (FLOAT + HALF) * LOGITS_AT_ONCE,
    }
    return {name: round(size / GIB, 3) for name, size in (parts | {"all": sum(parts.values())}).items()}


if __name__ == "__main__":
    main()
