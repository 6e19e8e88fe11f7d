"""Streams that share keys and values, as adapters: loaded beside others, used, put away, and pickled."""

import pickle
from pathlib import Path

import torch

import parscale
from tests.small import build, with_streams

SHARED = {"kv": "shared", "diversify": ("prefix", "lora")}


def test_adapters_of_both_kinds_on_one_backbone(tmp_path: Path) -> None:
    ids = torch.arange(3, 15).view(2, 6)
    outputs = {}
    for name, streams in {"own": {}, "shared": SHARED, "one prefix": SHARED | {"shared_prefix": True}}.items():
        model = with_streams(build(), **streams)
        parscale.save_streams(model, tmp_path / name)
        outputs[name] = model(ids).logits
    base = build()
    plain = base(ids).logits
    for name in outputs:
        parscale.load_streams(base, tmp_path / name, name=name)
    for name in ("shared", "own", "one prefix", "own", "shared"):
        parscale.use_streams(base, name)
        assert torch.equal(base(ids).logits, outputs[name]), name
    parscale.use_streams(base, None)
    assert torch.equal(base(ids).logits, plain)


def test_pickles() -> None:
    model = with_streams(build(), **SHARED)
    ids = torch.arange(3, 15).view(2, 6)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(again.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
