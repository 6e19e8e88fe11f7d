"""What `parscale train pretrain --model` takes, when it is a folder: a configuration, and nothing that runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from parscale.errors import InputError
from parscale.train.data import train_tokenizer
from parscale.train.shapes import build


def write(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("known", [True, False])
def test_a_configuration_runs_no_code_of_its_own(known: bool, tmp_path: Path) -> None:
    """Asked whether to trust it, a user might say yes: nobody is asked. A family that is known does without it."""
    mark = tmp_path / "it ran"
    (tmp_path / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    )
    own = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "hidden_size": 32}
    folder = write(tmp_path, own | {"model_type": "llama" if known else "evil", "num_hidden_layers": 1})
    tokenizer = train_tokenizer(["some text"], 300)
    if known:
        build(folder, tokenizer, 16)
    else:
        with pytest.raises(InputError, match="give one of"):
            build(folder, tokenizer, 16)
    assert not mark.exists()


def test_what_is_no_causal_model_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, {"model_type": "t5", "vocab_size": 1000})
    with pytest.raises(InputError, match="not the configuration of a causal LM"):
        build(folder, train_tokenizer(["some text"], 300), 16)
