"""Several processes against one: data parallel, fully sharded, and with the streams split over them."""

import json
import os
import subprocess
import sys
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.train.config import Balance
from parscale.train.parallel import check_launch, check_stream_parallel
from parscale.train.trainer import StreamsTrainer, train
from parscale.utils.lock import LOCK
from tests import small
from tests.train import processes
from tests.train.children import run_of, save_stream_gradients, stream_batch, train_and_record, train_until

DDP: dict[str, str] = {"ACCELERATE_USE_CPU": "true"}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
TWENTY = {"tokens": 20 * 4 * 16, "save_every": None}


@pytest.fixture(scope="module")
def alone(base: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps in one process, sequences of four in a step."""
    output = tmp_path_factory.mktemp("alone") / "out"
    train(run_of(output, corpus, model=str(base), **TWENTY))
    return output


def _losses(output: Path) -> list[float]:
    history = json.loads((output / "train.json").read_text())["result"]["history"]
    return [row[key] for row in history for key in ("loss", "eval_loss") if key in row]


def _check_same(found: Path, expected: Path) -> None:
    assert _losses(found) == pytest.approx(_losses(expected), rel=1e-4)
    ours, truth = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert ours.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("env", "changes"),
    [
        pytest.param(DDP, {"batch_size": 2}, id="ddp"),
        pytest.param(FSDP2, {"batch_size": 2}, id="fsdp2"),
        pytest.param(DDP, {"stream_parallel": 2}, id="streams"),
    ],
)
def test_two_processes_learn_what_one_does(env, changes, base, corpus, alone, tmp_path) -> None:
    config = run_of(tmp_path / "out", corpus, model=str(base), **TWENTY | changes)
    assert processes.run(train_and_record, config, tmp_path / "record", processes=2, **env) == [0, 0]
    _check_same(tmp_path / "out", alone)


def test_fewer_streams_in_two_processes(base: Path, corpus: Path, tmp_path: Path) -> None:
    """Streams that are left out have no gradient, for which the other process would wait."""
    changes = {"balance": Balance(fewer_streams=0.9), "gradient_checkpointing": True, "batch_size": 2}
    config = run_of(tmp_path / "out", corpus, model=str(base), **TWENTY | changes)
    assert processes.run(train_and_record, config, tmp_path / "record", processes=2, **DDP) == [0, 0]
    with pytest.raises(InputError, match=r"fewer_streams=0\.9 with stream_parallel=2"):
        check_launch(run_of(tmp_path / "no", corpus, balance=Balance(fewer_streams=0.9), stream_parallel=2))


def test_one_process_takes_one_gpu(base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two that are there, the Trainer would put batches twice as large through nn.DataParallel."""
    setup = TrainingArguments._setup_devices.func  # type: ignore[attr-defined]

    def with_two(self: TrainingArguments) -> torch.device:
        device = setup(self)
        self._n_gpu = 2
        return device

    devices = cached_property(with_two)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    rows: list[int] = []
    step = StreamsTrainer.training_step

    def watching(self: StreamsTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(len(inputs["input_ids"]))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StreamsTrainer, "training_step", watching)
    train(run_of(tmp_path / "out", corpus, model=str(base), save_every=None))
    assert rows == [4] * 12


def test_shards_in_bfloat16_are_near_and_their_loss_is_not_rounded(base, corpus, alone, tmp_path) -> None:
    config = run_of(tmp_path / "out", corpus, model=str(base), **TWENTY | {"batch_size": 2})
    env = FSDP2 | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    assert processes.run(train_and_record, config, tmp_path / "record", processes=2, **env) == [0, 0]
    found, exact = _losses(tmp_path / "out"), _losses(alone)
    assert found == pytest.approx(exact, rel=0.02)
    assert found != pytest.approx(exact, rel=1e-5), "something was computed in bfloat16"
    rounded = torch.tensor(found, dtype=torch.float64).bfloat16().double()
    assert rounded.tolist() != pytest.approx(found, rel=1e-5)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_sharded_checkpoint_goes_on_in_another_number(before, after, base, corpus, alone, tmp_path) -> None:
    output = tmp_path / "out"
    config = partial(run_of, output, corpus, model=str(base), tokens=TWENTY["tokens"], save_every=8)
    processes.run(train_until, config(batch_size=4 // before), 11, processes=before, **FSDP2)
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-8", LOCK]  # of the process that was killed
    shards = [load_file(file) for file in sorted((output / "checkpoint-8").glob("*.safetensors"))]
    whole = load_file(base / "model.safetensors")["model.embed_tokens.weight"].shape
    held = [shard["model/model.embed_tokens.weight"].shape[0] for shard in shards]
    assert held == [whole[0] // before] * before, "every process keeps its part"
    goes_on = config(batch_size=4 // after, resume=True)
    assert set(processes.run(train_until, goes_on, processes=after, **FSDP2)) == {0}
    _check_same(output, alone)


@pytest.mark.parametrize(("count", "size"), [(2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize(
    "streams",
    [{"diversify": ("prefix", "embedding")}, {"diversify": ("prefix", "lora", "rank1"), "aggregate": "mean"}],
    ids=["embedding", "lora"],
)
def test_split_streams_give_the_exact_gradient(count: int, size: int, streams: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "gradients.safetensors"
    exits = processes.run(partial(save_stream_gradients, **streams), size, file, processes=count)
    assert exits == [0] * count
    model = small.with_streams(small.build().double(), **streams)
    ids = stream_batch()
    model(input_ids=ids, labels=ids).loss.backward()
    found = load_file(file)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("streams", "size", "count", "named"),
    [
        (2, 4, 4, "with 2 streams"),
        (4, 3, 3, "with 4 streams"),
        (4, 2, 3, "with 3 processes"),
        (4, 2, 1, "with 1 process:"),
    ],
)
def test_a_split_that_does_not_come_out_even_is_refused(streams: int, size: int, count: int, named: str) -> None:
    model = small.with_streams(small.build(), streams=streams)
    with pytest.raises(InputError, match=f"stream_parallel={size} {named}"):
        check_stream_parallel(model, size, count)


@pytest.mark.parametrize(
    ("launcher", "changes", "named"),
    [
        ("DEEPSPEED", {}, "save_every=3 under DeepSpeed"),
        ("DEEPSPEED", {"save_every": None, "resume": True}, "resume=True under DeepSpeed"),
        ("FSDP", {"peft": "lora"}, "peft='lora' under FSDP"),
        ("FSDP", {"streams": StreamsConfig(2, prefix_init="reparameterized")}, "reparameterized"),
    ],
)
def test_what_a_launcher_cannot_do_is_refused(launcher, changes, named, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=named):
        train(run_of(tmp_path / "out", tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_more_processes_than_streams_stop_before_the_first_step(base, corpus, tmp_path) -> None:
    with pytest.raises(InputError, match="stream_parallel=3 with 2 streams"):
        train(run_of(tmp_path / "out", corpus, model=str(base), stream_parallel=3))
    assert not list(tmp_path.iterdir())


ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
ZERO = [*ACCELERATE, "--use_deepspeed", "--mixed_precision", "no", "--zero_stage"]
LAUNCHERS = {
    "ddp": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "fsdp2": [
        *ACCELERATE, "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    ],
    "zero2": [*ZERO, "2"],
    "zero3": [*ZERO, "3"],
}  # fmt: skip


def _launch(launcher: str, output: Path, base: Path, corpus: Path) -> Any:
    if launcher.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs deepspeed")
    command = [
        "-m", "parscale", "train", "retrofit", "--output", output, "--model", base, "--data", corpus,
        "--cache-dir", corpus.parent / "cache", "--streams", "2", "--prefix-tokens", "4", "--diversify", "prefix",
        "embedding", "--tokens", str(20 * 4 * 16), "--batch-size", "2", "--block-size", "16", "--validation-blocks",
        "4", "--evaluations", "1",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    words = [sys.executable, *LAUNCHERS[launcher], *map(str, command)]
    return subprocess.run(words, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "fsdp2", "zero2"])
def test_launchers_start_the_command(launcher: str, base: Path, corpus: Path, alone: Path, tmp_path: Path) -> None:
    done = _launch(launcher, tmp_path / "out", base, corpus)
    assert done.returncode == 0, done.stderr
    _check_same(tmp_path / "out", alone)


@pytest.mark.slow
def test_weights_that_could_not_be_saved_are_refused_before_the_first_step(base, corpus, tmp_path) -> None:
    done = _launch("zero3", tmp_path / "out", base, corpus)
    assert done.returncode
    assert "zero_stage=3 shards the weights where they cannot be saved" in done.stderr
    assert not (tmp_path / "out").exists()
