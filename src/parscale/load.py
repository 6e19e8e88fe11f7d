"""Loading a model, with or without streams, so that whatever is wrong with its folder is told in one line."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale.errors import InputError


def load_model(name: str | Path, **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, safetensors only and no remote code.

    Raises:
        InputError: no such folder or hub name, a config that no model understands, or a damaged checkpoint.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, trust_remote_code=False, **options)
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"model {str(name)!r}: its safetensors file is damaged ({first_line(error)})") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"model {str(name)!r} cannot be loaded: {first_line(error)}") from None


def load_tokenizer(name: str | Path) -> Any:
    """`AutoTokenizer.from_pretrained` without remote code.

    Raises:
        InputError: the folder or hub name has no tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {str(name)!r} cannot be loaded: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """What an error says first: later lines are advice for the developers of other libraries."""
    return (str(error).splitlines() or [type(error).__name__])[0]
