"""vLLM with the plugin, on a CPU, against this library's own forward; `make test-vllm` runs them in an environment of
their own."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from parscale.load import load_model
from tests.small import build, with_streams

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")
pytestmark = pytest.mark.slow

NEW = 24
LENGTHS = (5, 17, 40, 70, 33, 100)
OWN = {"prefix_tokens": 48}
SHARED = {"prefix_tokens": 48, "diversify": ("prefix", "embedding", "lora"), "kv": "shared", "shared_prefix": True}


def save(folder: Path, family: str = "qwen2", streams: dict[str, Any] | None = None, **config: Any) -> Path:
    """A model of random weights that are large enough for the prefix to matter. vLLM's kernels want heads of 32."""
    shape = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 256}
    model = build(family, **(shape | {"initializer_range": 0.1} | config))
    if streams is not None:
        with_streams(model, **streams)
        for name, parameter in model.named_parameters():
            if "stream_lora_b" in name:
                torch.nn.init.normal_(parameter, std=0.1)
            elif "prefix_v" in name:
                torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def reference(folder: Path) -> list[dict[str, list[Any]]]:
    """Greedy tokens and their log-probabilities by transformers in float32."""
    model = load_model(folder, dtype=torch.float32).eval()
    told = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), output_scores=True, return_dict_in_generate=True, **options
        )
        tokens = out.sequences[0, len(prompt) :].tolist()
        scores = [score[0].log_softmax(-1)[token].item() for token, score in zip(tokens, out.scores, strict=True)]
        told.append({"tokens": tokens, "logprobs": scores})
    return told


def run(folder: Path, repeat: int = 1, reserve: bool = True, **options: Any) -> dict[str, Any]:
    settings = {"model": str(folder), "prompts": prompts(), "new": NEW, "repeat": repeat, "reserve": reserve}
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.engine", json.dumps(settings | {"options": options})],
        capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def matching(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> int:
    """Tokens that are equal, over all prompts."""
    return sum(
        a == b for f, e in zip(found, expected, strict=True) for a, b in zip(f["tokens"], e["tokens"], strict=True)
    )


def assert_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert matching(found, expected) == NEW * len(LENGTHS)
    for f, e in zip(found, expected, strict=True):
        assert f["logprobs"] == pytest.approx(e["logprobs"], abs=1e-4)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_tokens_are_those_of_transformers(streams: int, tmp_path: Path) -> None:
    """A batch, then the same prompts from the prefix cache."""
    folder = save(tmp_path / "m", streams=OWN | {"streams": streams})
    told, expected = run(folder, repeat=2), reference(folder)
    assert_equal(told["rounds"][0], expected)
    assert_equal(told["rounds"][1], expected)
    assert max(answer["cached"] for answer in told["rounds"][1]) >= 80


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_families(family: str, tmp_path: Path) -> None:
    options = {"sliding_window": None} if family == "mistral" else {}
    folder = save(tmp_path / "m", family, OWN | {"streams": 2}, **options)
    assert_equal(run(folder)["rounds"][0], reference(folder))


def test_a_lora_on_chosen_projections(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "m", streams=OWN | {"diversify": ("prefix", "lora"), "lora_targets": ("q_proj", "up_proj")}
    )
    assert_equal(run(folder)["rounds"][0], reference(folder))


def test_chunked_prefill(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", streams=OWN)
    told = run(folder, max_num_batched_tokens=32, enable_chunked_prefill=True)
    assert_equal(told["rounds"][0], reference(folder))


def test_compiled(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", streams=OWN)
    assert_equal(run(folder, enforce_eager=False)["rounds"][0], reference(folder))


def test_tensor_parallel(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", streams=OWN)
    assert_equal(run(folder, tensor_parallel_size=2)["rounds"][0], reference(folder))


def test_without_the_reservation_the_prefix_is_overwritten(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", streams=OWN)
    found = run(folder, reserve=False)["rounds"][0]
    assert matching(found, reference(folder)) < NEW * len(LENGTHS) // 2


def test_shared_keys_and_values(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", streams=SHARED)
    told, expected = run(folder, repeat=2), reference(folder)
    assert_equal(told["rounds"][0], expected)
    assert_equal(told["rounds"][1], expected)


def test_shared_keys_and_values_take_the_plain_models_cache(tmp_path: Path) -> None:
    """In blocks of 32: a plain model takes no smaller ones on a processor."""
    plain, shared = save(tmp_path / "plain"), save(tmp_path / "shared", streams=SHARED | {"prefix_tokens": 64})
    assert run(shared, block_size=32)["cache"] == run(plain, block_size=32)["cache"]


def test_shared_keys_and_values_tensor_parallel(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", streams=SHARED)
    assert_equal(run(folder, tensor_parallel_size=2)["rounds"][0], reference(folder))


@pytest.mark.parametrize(
    ("streams", "reason"),
    [
        ({"prefix_tokens": 5}, "does not fill blocks of 16"),
        (OWN | {"kv": "shared"}, "not grouped-query attention"),
        (OWN | {"diversify": ("prefix", "rank1")}, "rank1"),
    ],
)
def test_what_cannot_be_served_is_refused(streams: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=reason):
        run(save(tmp_path / "m", streams=streams))


def test_another_vllm_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", streams=OWN)
    code = f"""
import os
os.environ |= {{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}}
import vllm
vllm.__version__ = "0.99.0"
vllm.LLM({str(folder)!r}, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, block_size=16)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "tested with vLLM 0.32.0, this is 0.99.0" in done.stderr


def test_over_http(tmp_path: Path) -> None:
    from parscale.train.data import train_tokenizer

    folder = save(tmp_path / "m", streams=OWN, vocab_size=300)
    train_tokenizer(["some text, and more of it"], 300).save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "m",
        "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--block-size", "16", "--max-model-len",
        "256", "--enforce-eager",
    ]  # fmt: skip
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
            expected = reference(folder)
            for prompt, told in zip(prompts(), expected, strict=True):
                body = {"model": "m", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
                body |= {"logprobs": 1, "return_tokens_as_token_ids": True}
                answer = _post(f"http://127.0.0.1:{port}/v1/completions", body)["choices"][0]["logprobs"]
                assert [int(token.removeprefix("token_id:")) for token in answer["tokens"]] == told["tokens"]
                assert answer["token_logprobs"] == pytest.approx(told["logprobs"], abs=1e-4)
        finally:
            server.terminate()
            server.wait(60)


def _wait_for(url: str, server: Any, log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(re.sub(r"\x1b\[[0-9;]*m", "", log.read_text())[-4000:])


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=300).read())
