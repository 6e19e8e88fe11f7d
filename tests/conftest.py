"""What all tests share: shapes checked by beartype, one thread, no progress bars, and the optional shared data."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads cost more than they give
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from jaxtyping import install_import_hook
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
# Before parscale is first imported. `torch.compile` cannot look through the checks, so compiled models are tested in
# a process of their own (tests/contract/compiled.py).
install_import_hook("parscale.streams", "beartype.beartype")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with fixtures and corpora that are not part of the project."""
    where = os.environ.get("PARSCALE_SHARED")
    if not where or not Path(where).is_dir():
        pytest.skip("PARSCALE_SHARED does not name a folder with the shared fixtures")
    return Path(where)
