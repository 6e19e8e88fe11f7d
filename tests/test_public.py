"""What `import parscale` gives and costs, and that imports run downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import parscale
from parscale.streams.families import REGISTERED
from tests.small import build, with_streams

SOURCE = Path(parscale.__file__).parent


def test_every_public_name_is_there() -> None:
    assert sorted(parscale.__all__) == list(parscale.__all__)
    for name in parscale.__all__:
        assert getattr(parscale, name).__doc__, name


def test_import_loads_no_extra() -> None:
    heavy = ("datasets", "matplotlib", "tyro", "rich", "pandas", "vllm", "onnx", "openvino", "peft", "fastapi")
    code = f"""
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM
before = set(sys.modules)
import parscale
print([m for m in {heavy} if m in set(sys.modules) - before])
"""
    assert python(code) == "[]"


def test_import_alone_loads_a_saved_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = parscale.parallelize(LlamaForCausalLM(config).eval(), parscale.StreamsConfig(streams=2, prefix_tokens=5))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(torch.arange(8)[None]).logits.sum().item()
    found = python(f"""
import torch, parscale
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert model.streams == 2
print(model(torch.arange(8)[None]).logits.sum().item())
""")
    assert float(found) == pytest.approx(expected, rel=1e-4)


LAYERS = (
    {"config", "errors", "output", "arguments", "utils"},
    {"streams"},
    {"weights", "gguf"},
    {"load", "generate", "merge_folder", "train", "probe", "probe_details", "probe_plot", "evaluate", "law", "cost"},
    {"experiments", "serve", "export", "hub"},
    {"cli"},
    {"__main__"},
)
"""From below: a file may import its own layer and those before it."""


def test_arrows_run_downwards() -> None:
    rank = {name: level for level, names in enumerate(LAYERS) for name in names}
    for file in SOURCE.rglob("*.py"):
        own = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in rank, f"{own}: say in LAYERS where it stands"
        for module in imported(file):
            parts = module.split(".")
            if parts[0] == "parscale" and len(parts) > 1:
                assert rank[parts[1]] <= rank[own], f"{file.relative_to(SOURCE)} imports {module}"


def test_law_and_cost_model_need_no_torch() -> None:
    for file in [*SOURCE.glob("law/*.py"), SOURCE / "cost/model.py"]:
        if file.exists():
            assert not {"torch", "transformers"} & {m.split(".")[0] for m in imported(file)}, file


def test_the_command_line_loads_families_that_are_not_registered(tmp_path: Path) -> None:
    assert "olmo2" not in REGISTERED
    with_streams(build("olmo2")).save_pretrained(tmp_path)
    code = f"from parscale.load import load_model; print(load_model({str(tmp_path)!r}).streams)"
    assert python(code) == "4"


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module))
    return found


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
