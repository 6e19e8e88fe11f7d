"""Reading GGUF files, llama.cpp's format: the weights dequantised, the tokenizer and its chat template from the file.

Loads neither torch nor transformers before a file is read: the cost model asks it for shapes.
"""

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from parscale.errors import InputError
from parscale.output import say

SUFFIX = ".gguf"


def find(name: str | Path) -> Path | None:
    """The GGUF file that a model's name means: the file itself, or the only one of a folder without a `config.json`.

    Raises:
        InputError: the folder has several, or the file is none or was cut short.
    """
    path = Path(name)
    if path.is_dir():
        found = sorted(path.glob(f"*{SUFFIX}"))
        if not found or (path / "config.json").exists():
            return None
        if len(found) > 1:
            raise InputError(f"model {str(name)!r} has {len(found)} GGUF files: give one, such as {str(found[0])!r}")
        path = found[0]
    if path.suffix.lower() != SUFFIX or not path.is_file():
        return None
    _types(path)
    return path


def load_model(file: Path, **options: Any) -> Any:
    """The causal LM of a GGUF file, in `dtype` (float32 by default), with no trace of its quantisation.

    Raises:
        InputError: an architecture that transformers cannot read, or tensors that are missing or left over.
    """
    from transformers import AutoModelForCausalLM

    from parscale.weights import check_whole

    types = ", ".join(_types(file))
    told: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, **_dequantised() | options | told
    )
    model, info = loaded
    missing = set(info["missing_keys"]) - set(model.all_tied_weights_keys)
    check_whole(model, info | {"missing_keys": missing}, f"model {str(file)!r}")
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)  # older transformers dequantise, and then refuse to save
    model.name_or_path = model.config.name_or_path = str(file)
    say(f"{file.name}: {model.config.model_type}, {types} dequantised to {str(model.dtype).removeprefix('torch.')}")
    return model


def load_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file, with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def load_config(file: Path) -> Any:
    """The configuration of a GGUF file's model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    vars(config).pop("quantization_config", None)
    return config


def _dequantised() -> dict[str, Any]:
    """Keywords of `from_pretrained`: newer transformers keep the blocks where they have a kernel for them."""
    import transformers

    settings: Any = getattr(transformers, "GgufConfig", None)
    return {} if settings is None else {"quantization_config": settings(dequantize=True)}


@lru_cache(maxsize=8)
def _tensor_types(file: Path, size: int, changed: int) -> tuple[str, ...]:
    """Names of the quantisation types in the file, the most frequent first. Reading its header takes a second, and
    every question about a model asks for it: it is read once for each size and time of change.

    Raises:
        InputError: the file ends before its last tensor does, or its header is not one.
    """
    try:
        from gguf import GGUFReader  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(f"model {str(file)!r} needs the package gguf: pip install 'parscale[gguf]'") from None
    try:
        counts = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors)
    except Exception as error:  # the reader believes every number of the file: it raises anything
        reason = type(error).__name__
        raise InputError(f"model {str(file)!r} is no whole GGUF file ({reason}): fetch it again") from None
    if not counts:
        raise InputError(f"model {str(file)!r} is a GGUF file without tensors")
    return tuple(name for name, _ in counts.most_common())


def _types(file: Path) -> tuple[str, ...]:
    about = file.stat()
    return _tensor_types(file, about.st_size, about.st_mtime_ns)
