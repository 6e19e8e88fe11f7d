"""A released checkpoint by its name on the hub, found in the hub's cache: nothing leaves the machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.data import make_released

RELEASED = Path(make_released.__file__).parent / "released"
LOAD = """
import json, sys
import torch
import parscale
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("owner/name", dtype=torch.float32)
ids = torch.tensor(json.loads(sys.argv[1]))
tokens = model.generate(ids, max_new_tokens=int(sys.argv[2]), do_sample=False)
print(json.dumps([type(model).__module__, model.config.model_type, model.streams, tokens.tolist()]))
"""


@pytest.mark.parametrize("name", ["p1_tied", "p4_n48_bf16_sharded"])
def test_a_released_checkpoint_by_its_hub_name(name: str, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    shutil.copytree(RELEASED / name, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    expected = load_file(RELEASED / name / "reference.safetensors")
    asked = [json.dumps(expected["input_ids"].tolist()), str(make_released.NEW_TOKENS)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *asked], capture_output=True, text=True, check=False, env=offline
    )
    assert done.returncode == 0, done.stderr
    module, family, streams, tokens = json.loads(done.stdout.splitlines()[-1])
    assert module.startswith("parscale.")
    assert (family, streams) == ("qwen2_parscale", int(name[1]))
    assert tokens == expected["greedy"].tolist()
