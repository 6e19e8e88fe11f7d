"""Attention of one decoded token of all streams in bfloat16 on a CPU: torch's fused kernel, which the library takes,
beside products of matrices whose scores are rounded to bfloat16. Time, and error against float64.

    python benchmarks/decode_attention.py

Keys and values are shared, 16 query heads on 2 key/value heads of 56, as in the 0.54 B shape; a prefix of 48 each.
Rows: median, quartiles, the ratio to the fused kernel, and the root mean square error as a share of the outputs' own.
"""

import argparse
from functools import partial
from typing import Any
from unittest import mock

import torch
from record import interleaved, summary, write
from torch import Tensor

from parscale.streams import decode as file
from parscale.streams.decode import decode

HEADS, KV_HEADS, SIZE, PREFIX = 16, 2, 56, 48


def made(streams: int, context: int) -> list[Any]:
    """Query, keys, values, prefix, mask and scale of random numbers, with scores of a spread of 2.5."""
    draw = [torch.randn(shape) for shape in _shapes(streams, context)]
    query, key, value, prefix_k, prefix_v = (x.bfloat16() for x in draw)
    mask = torch.ones(streams, 1, 1, context, dtype=torch.bool)
    return [query * 2.5, key, value, (prefix_k, prefix_v), mask, None]


def _shapes(streams: int, context: int) -> list[tuple[int, ...]]:
    cache, prefix = (1, KV_HEADS, context, SIZE), (streams, KV_HEADS, PREFIX, SIZE)
    return [(streams, HEADS, 1, SIZE), cache, cache, prefix, prefix]


def attend(given: list[Any], streams: int, fused: bool) -> Tensor:
    with mock.patch.object(file, "_has_fused", return_value=fused):
        return decode(*given, streams)


def error(given: list[Any], streams: int, fused: bool) -> float:
    """Root mean square over all outputs, as a share of theirs in float64."""
    query, key, value, prefix, mask, scale = given
    exact = [query.double(), key.double(), value.double(), tuple(x.double() for x in prefix), mask, scale]
    truth = attend(exact, streams, fused=False)
    return ((attend(given, streams, fused) - truth).square().mean() / truth.square().mean()).sqrt().item()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--contexts", type=int, nargs="*", default=[1024, 4096, 16384])
    arguments.add_argument("--streams", type=int, nargs="*", default=[1, 8])
    arguments.add_argument("--rounds", type=int, default=31)
    options = arguments.parse_args()
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for context in options.contexts:
            for streams in options.streams:
                given = made(streams, context)
                runs = {"fused": True, "products": False}
                steps = {name: partial(attend, given, streams, fused) for name, fused in runs.items()}
                times = interleaved(steps, options.rounds)
                for name, fused in runs.items():
                    about = {"context": context, "streams": streams, "case": name}
                    told = {"error": round(error(given, streams, fused), 5)}
                    rows.append(about | summary(times[name], times["fused"]) | told)
                    print(rows[-1], flush=True)
    print(write("decode_attention", vars(options), rows))


if __name__ == "__main__":
    main()
