"""What the serving tests share."""

from pathlib import Path
from typing import Any

import pytest

from tests.serve.processes import byte_tokenizer, save, small_model

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")


@pytest.fixture(scope="session")
def model() -> Any:
    """Four streams, not to be changed."""
    return small_model()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def folder(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("served"), model, tokenizer)
