"""Derived costs against the released analysis' own numbers, and against sums written out by hand.

released.csv: what the authors' `cost_analysis.py` (QwenLM/ParScale at cd6acb4, on cli99/llm-analysis at d841e40) prints
for each row's --hidden_size, --intermediate_size, --P, --batch_size, --input_length and --output_length, with six
decimals instead of three.
"""

import csv
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from parscale.cost import formulas
from parscale.cost.hardware import HARDWARE, hardware_of
from parscale.cost.model import DTYPES, GIB, PAPER_SHAPES, Shape, Workload, cost, cost_table, shape_of
from parscale.errors import InputError
from parscale.law.runs import paper

RELEASED = list(csv.DictReader((Path(__file__).parent / "released.csv").read_text().splitlines()))
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("row", RELEASED, ids=lambda row: ",".join(row.values()))
def test_the_released_analysis_is_reproduced(row: dict[str, str]) -> None:
    shape = Shape(int(row["hidden"]), int(row["intermediate"]))
    work = Workload(int(row["streams"]), int(row["batch"]), int(row["in"]), int(row["out"]))
    derived = cost(shape, work, "a100-80g")
    assert derived["memory_gib"] == pytest.approx(float(row["memory_gib"]), rel=2e-4)
    assert derived["latency_s"] == pytest.approx(float(row["latency_s"]), rel=2e-4)


def test_the_numbers_of_the_paper_at_64_in_and_out() -> None:
    """(size, P): GiB, seconds, as the released script prints them."""
    known = {("1.6B", 1): (3.383, 0.128), ("1.6B", 8): (3.465, 0.144), ("4.4B", 1): (8.856, 0.337)}
    for (name, streams), (memory, latency) in known.items():
        row = cost(PAPER_SHAPES[name], Workload(streams))
        assert (row["memory_gib"], row["latency_s"]) == pytest.approx((memory, latency), abs=6e-4)


def test_params_are_the_papers_to_the_last_one() -> None:
    counted = {shape.params(p) for shape in PAPER_SHAPES.values() for p in (1, 2, 4, 8)}
    assert counted == {row["params"] for row in paper("stack")}


@pytest.mark.parametrize("accounting", ["released", "counted"])
@pytest.mark.parametrize("streams", [1, 8])
def test_the_parts_make_the_whole(accounting, streams: int) -> None:
    row = cost(PAPER_SHAPES["0.5B"], Workload(streams, batch=2, accounting=accounting))
    assert sum(row["memory"].values()) == pytest.approx(row["memory_gib"])
    parts = row["latency"]
    assert parts["prefill"] + parts["decode"] == pytest.approx(row["latency_s"])
    assert parts["decode"] == pytest.approx(64 * parts["decode_step"])


def test_counted_is_the_forward_written_out() -> None:
    """One decode step of a small shape, P = 4, batch 2, prompt 100, 1 new token, on a machine bound by its memory."""
    shape = Shape(64, 160, layers=2, heads=4, kv_heads=2, vocab=1000)
    work = Workload(4, batch=2, input=100, output=1, accounting="counted", flops_efficiency=1, bandwidth_efficiency=1)
    machine = replace(HARDWARE["a100-80g"], flops=1e30, bandwidth=1e9)
    rows, d, f = 4 * 2, 64, 160
    projections = 2 * (2 * d * d + 2 * d * 32 + 3 * d * f)
    head = 4 * d * d + d + d * 4 + 4
    cache_entry = 2 * 2 * 2 * 16  # layers × (key, value) × kv heads × head size
    activations = 2 * rows * (max(3 * d, 2 * d + 16) + max(d, f))
    norms = 2 * 2 * rows * d * 4
    moved = 2 * (projections + 1000 * d + head + cache_entry * rows * (100 + 48 + 1 + 1) + activations) + norms
    assert cost(shape, work, machine)["latency"]["decode_step"] == pytest.approx(moved / 1e9, rel=1e-12)
    held = 2 * (projections + 2 * (2 * d + 16 * 8) + d + 1000 * d + head + cache_entry * (rows * 101 + 4 * 48))
    held += 2 * max(rows * 100 * 3 * d, 1000 * 2)
    assert cost(shape, work, machine)["memory_gib"] == pytest.approx(held / GIB, rel=1e-12)


def test_a_compute_bound_prefill_is_the_operations_over_the_peak() -> None:
    shape = Shape(64, 160, layers=2, heads=4, kv_heads=2, vocab=1000)
    work = Workload(4, batch=2, input=100, output=1, accounting="counted", flops_efficiency=0.5)
    machine = replace(HARDWARE["a100-80g"], flops=2e9, bandwidth=1e30)
    d, f, tokens = 64, 160, 4 * 2 * 100
    linear = 2 * tokens * 2 * (2 * d * d + 2 * d * 32 + 3 * d * f)
    scores = 4 * 8 * (100 * 48 + 100 * 100 / 2) * 64 * 2
    ends = 2 * 2 * (1000 * d + 4 * d * d + d + d * 4 + 4)  # two requests' last positions: aggregation head, LM head
    assert cost(shape, work, machine)["latency"]["prefill"] == pytest.approx((linear + scores + ends) / 1e9, rel=1e-12)


@pytest.mark.parametrize("prompt", [100, 1])
def test_shared_keys_are_one_streams_prompt_and_cache_written_out(prompt: int) -> None:
    """P = 4, batch 2, one new token: bytes on a machine bound by its memory, operations on one bound by arithmetic."""
    shape = Shape(64, 160, layers=2, heads=4, kv_heads=2, vocab=1000)
    work = Workload(4, 2, prompt, 1, accounting="counted", kv="shared", flops_efficiency=1, bandwidth_efficiency=1)
    batch, rows, d, f, kv = 2, 8, 64, 160, 2 * 64 * 32
    mixing = 2 * (2 * d * d + kv + 3 * d * f)
    head = 4 * d * d + d + d * 4 + 4
    cache_entry = 2 * 2 * 2 * 16  # layers × (key, value) × kv heads × head size

    read = batch * (prompt + 3)  # the first stream's prompt, and the last token of three others behind it

    arithmetic = cost(shape, work, replace(HARDWARE["a100-80g"], flops=1e9, bandwidth=1e30))["latency"]
    linear = 2 * read * mixing
    scores = 4 * 2 * d * batch * (prompt * (48 + prompt / 2) + 3 * (prompt + 48))
    ends = 2 * batch * (1000 * d + head)
    assert arithmetic["prefill"] == pytest.approx((linear + scores + ends) / 1e9, rel=1e-12)
    one_token = 2 * (rows * mixing - 2 * (rows - batch) * kv)  # keys and values of one stream
    assert arithmetic["decode_step"] == pytest.approx(
        (one_token + 4 * 2 * d * rows * (prompt + 1 + 48) + ends) / 1e9, rel=1e-12
    )

    moving = cost(shape, work, replace(HARDWARE["a100-80g"], flops=1e30, bandwidth=1e9))["latency"]
    ends = 2 * (1000 * d + head)
    prompts = 2 * (mixing + 2 * read * (3 * d + f)) + 2 * 2 * read * d * 4
    assert moving["prefill"] == pytest.approx((prompts + ends + 2 * cache_entry * batch * prompt) / 1e9, rel=1e-12)
    step = 2 * (mixing + 2 * rows * (3 * d + f)) + 2 * 2 * rows * d * 4
    traffic = 2 * cache_entry * (batch * (prompt + 1 + 1) + rows * 48)  # every stream of a request reads its own prefix
    assert moving["cache_traffic"] == pytest.approx(traffic / 1e9, rel=1e-12)
    assert moving["decode_step"] == pytest.approx((step + ends + traffic) / 1e9, rel=1e-12)

    held = cost(shape, work)["memory"]
    assert held["kv_cache"] == pytest.approx(2 * cache_entry * (batch * (prompt + 1) + 4 * 48) / GIB, rel=1e-12)
    assert held["activations"] == pytest.approx(2 * max(read * 3 * d, 1000 * batch) / GIB, rel=1e-12)


def test_sharing_makes_prefill_one_streams_and_changes_nothing_for_one_stream() -> None:
    shape, long = PAPER_SHAPES["1.6B"], Workload(8, batch=4, input=2048, accounting="counted")
    own, shared = (cost(shape, replace(long, kv=kv))["latency"]["prefill"] for kv in ("own", "shared"))
    one = cost(shape, replace(long, streams=1))
    assert own == pytest.approx(8 * one["latency"]["prefill"], rel=0.1)
    assert shared == pytest.approx(one["latency"]["prefill"], rel=0.1)
    for accounting in ("released", "counted"):
        plain = replace(long, streams=1, accounting=accounting)
        assert cost(shape, replace(plain, kv="shared")) == cost(shape, plain)


def test_what_each_choice_does() -> None:
    shape, plain = PAPER_SHAPES["1.6B"], Workload(8, batch=8, input=512)
    own = cost(shape, plain)
    shared = cost(shape, replace(plain, kv="shared"))
    assert shared["memory"]["kv_cache"] == pytest.approx(own["memory"]["kv_cache"] / 8)
    assert shared["latency"]["cache_traffic"] == pytest.approx(own["latency"]["cache_traffic"] / 8)
    weights = {dtype: cost(shape, replace(plain, dtype=dtype))["memory"]["weights"] for dtype in DTYPES}
    assert weights["int4"] < weights["int8"] < weights["bf16"] == weights["fp16"] == weights["fp32"] / 2
    slow = cost(shape, replace(plain, flops_efficiency=0.35, bandwidth_efficiency=0.45))
    assert slow["latency_s"] == pytest.approx(2 * own["latency_s"])
    faster = cost(shape, plain, "h200")
    assert faster["latency_s"] < own["latency_s"]
    assert faster["memory_gib"] == own["memory_gib"]


def test_streams_cost_time_where_arithmetic_is_short() -> None:
    """At batch 1 decoding eight streams is nearly free on an A100; at batch 32 it is not."""
    shape = PAPER_SHAPES["1.6B"]

    def ratio(batch: int) -> float:
        one, eight = (cost(shape, Workload(p, batch))["latency"]["decode_step"] for p in (1, 8))
        return eight / one

    assert ratio(1) < 1.05
    assert ratio(64) > 2


def test_shapes_by_size_config_and_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    shape = shape_of(tmp_path)
    assert shape == shape_of(tmp_path / "config.json") == Shape(64, 160, 2, 4, 2, 16, 1000, untied=True, bias=True)
    assert shape_of("1.6b") is PAPER_SHAPES["1.6B"]
    (tmp_path / "config.json").write_text(json.dumps({"text_config": QWEN | {"model_type": "llama", "head_dim": 32}}))
    assert shape_of(tmp_path) == Shape(64, 160, 2, 4, 2, 32, 1000, untied=True, bias=False)


@pytest.mark.parametrize(
    ("config", "untied"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "qwen2_parscale"}, True),
        ({"model_type": "gemma2"}, False),
        ({"model_type": "of tomorrow"}, True),
        ({}, True),
        ({"model_type": "gemma2", "tie_word_embeddings": False}, True),
        ({"model_type": "llama", "tie_word_embeddings": True}, False),
    ],
    ids=str,
)
def test_a_head_that_is_not_said_to_be_tied_is_as_its_family_has_it(
    config: dict[str, Any], untied: bool, tmp_path: Path
) -> None:
    unsaid = {key: value for key, value in QWEN.items() if key not in ("model_type", "tie_word_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps(unsaid | config))
    assert shape_of(tmp_path).untied is untied
    outer = {key: value for key, value in config.items() if key == "tie_word_embeddings"}
    inner = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
    (tmp_path / "config.json").write_text(json.dumps(outer | {"text_config": unsaid | inner}))
    assert shape_of(tmp_path).untied is untied


def test_the_shape_of_a_config_has_the_models_parameters(tmp_path: Path) -> None:
    """Against a model built by transformers, with streams put on it by this library."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import parscale

    config = {name: value for name, value in QWEN.items() if name != "model_type"}
    model = Qwen2ForCausalLM(Qwen2Config(**config))
    model.config.save_pretrained(tmp_path)
    shape = shape_of(tmp_path)
    assert shape.params() == _non_embedding(model)
    parscale.parallelize(model, parscale.StreamsConfig(streams=4))
    assert shape.params(4) == _non_embedding(model)


def _non_embedding(model) -> int:
    vocabulary = ("embed_tokens", "lm_head")
    return sum(p.numel() for name, p in model.named_parameters() if not any(word in name for word in vocabulary))


def test_tables_are_in_the_order_asked_for() -> None:
    rows = cost_table("0.5B", (1, 4), (1, 8), Workload(input=32, output=16), "l4")
    assert [(r["streams"], r["batch"], r["in"], r["out"]) for r in rows] == [
        (1, 1, 32, 16),
        (1, 8, 32, 16),
        (4, 1, 32, 16),
        (4, 8, 32, 16),
    ]


def test_a_hardware_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"flops": 312e12, "bandwidth": 2039e9, "memory": 80e9}))
    assert cost(PAPER_SHAPES["0.5B"], Workload(), path) == cost(PAPER_SHAPES["0.5B"], Workload())
    assert hardware_of(path).name == "mine"


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not JSON"), ("{}", "lacks 'flops'"), ('{"flops": 1, "bandwidth": -2, "memory": 3}', "bandwidth is -2")],
)
def test_bad_hardware_files(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=said):
        hardware_of(tmp_path / "bad.json")


def test_unknown_hardware_lists_the_known() -> None:
    with pytest.raises(
        InputError, match=r"'tpu' is not known: choose one of a100-80g, h100, h200, rtx4090, l4, m3-max, cpu"
    ):
        hardware_of("tpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"streams": 0}, "streams is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"output": 0}, "output is 0"),
        ({"dtype": "int3"}, "dtype 'int3' is not known: choose one of fp32"),
        ({"kv": "none"}, "kv 'none'"),
        ({"flops_efficiency": 1.5}, "flops_efficiency is 1.5"),
    ],
)
def test_bad_workloads(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Workload(**change)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (QWEN | {"num_local_experts": 8}, "mixture of experts"),
        ({"n_embd": 64}, "no 'hidden_size'"),
        ({k: v for k, v in QWEN.items() if k != "rms_norm_eps"}, "no 'rms_norm_eps'"),
        (QWEN | {"intermediate_size": [160, 160]}, r"intermediate_size is \[160, 160\]; an integer of at least 1"),
        (QWEN | {"hidden_size": "64"}, "hidden_size is '64'"),
        (QWEN | {"vocab_size": None}, "vocab_size is None"),
        (QWEN | {"num_hidden_layers": True}, "num_hidden_layers is True"),
        (QWEN | {"num_attention_heads": 0}, "num_attention_heads is 0"),
        (QWEN | {"num_key_value_heads": [2]}, r"num_key_value_heads is \[2\]"),
        (QWEN | {"head_dim": -8}, "head_dim is -8"),
        (QWEN | {"text_config": None}, "text_config is None; an object is needed"),
        (QWEN | {"model_type": None}, "model_type is None; a text is needed"),
        (QWEN | {"tie_word_embeddings": None}, "tie_word_embeddings is None; true or false is needed"),
    ],
)
def test_models_that_the_formulas_do_not_describe(tmp_path: Path, config: dict, said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        shape_of(tmp_path)
    with pytest.raises(InputError, match=r"'1\.7B' is not known: give a size of the paper \(0\.5B"):
        shape_of("1.7B")


def test_nothing_here_imports_torch_or_transformers() -> None:
    """The files themselves, run without the package's own __init__."""
    script = (
        "import sys, types, pathlib, importlib.util as u;"
        "root = pathlib.Path(u.find_spec('parscale').origin).parent;"
        "bare = types.ModuleType('parscale'); bare.__path__ = [str(root)]; sys.modules['parscale'] = bare;"
        "import parscale.cost.model, parscale.law, parscale.law.claim;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_formulas_take_plain_numbers_only() -> None:
    """The page runs them in JavaScript, which has no dataclasses: a shape's fields are its terms."""
    terms = asdict(PAPER_SHAPES["0.5B"])
    assert formulas.backbone_params(terms) == PAPER_SHAPES["0.5B"].params()
