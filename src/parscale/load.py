"""Loading a model, with or without streams, so that whatever is wrong with its folder is told in one line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from parscale import gguf
from parscale.config import StreamsConfig
from parscale.errors import InputError, first_line
from parscale.streams.backbone import has_streams
from parscale.streams.checkpoint import DEFAULT, MANIFEST, TENSORS, load_streams
from parscale.streams.families import SUFFIX, register_family
from parscale.streams.tensors import check_readable
from parscale.weights import check_experts, check_finite, check_quantized, check_whole

LORA = "adapter_config.json"
"""What `peft` calls the settings of a LoRA in its folder."""
LORA_TENSORS = "adapter_model.safetensors"
"""What `peft` calls the tensors of a LoRA in its folder."""
RECORD = "train.json"
"""What a training was told and gave; a folder that has it holds a whole model."""
_AS_WRITTEN = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes of tokenizers that are all in their tokenizer.json."""
TOKENIZER = "tokenizer_config.json"
_FETCHED = ["config.json", MANIFEST, TENSORS, LORA, LORA_TENSORS, RECORD, "*token*", "*.model", "vocab*", "merges.txt"]
"""Of a repository with adapters: the tokenizer too, and no pickle."""
TRAINED = "trained"
"""What streams of a folder are called on a base that came with streams of its own."""


def load_model(name: str | Path, *, quantize: str = "none", **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, safetensors only and no remote code, for streams on any family. A GGUF
    file, or a folder with one, is dequantised.

    Adapters, in a folder or on the hub, are loaded onto the base that they name: a LoRA of `peft` is merged into its
    weights, or put on where they are quantised, and the streams beside it are put on. `quantize` holds the backbone in
    "int8" or "int4": by torchao on a CPU, by bitsandbytes on a GPU.

    Raises:
        InputError: no such folder or hub name, a config that no model understands, a damaged checkpoint, tensors that
            are missing, unexpected, of another shape or not finite, a LoRA that is not whole, adapters of a base in
            other bits, or a package that this takes is not there.
    """
    with _told_in_one_line("model", name):
        model = _load(name, quantize, options)
        check_finite(model, f"model {str(name)!r}")
    return model


def _load(name: str | Path, quantize: str, options: dict[str, Any]) -> Any:
    if (file := gguf.find(name)) is not None:
        if quantize != "none":
            raise InputError(
                f"quantize={quantize!r} with the GGUF file {str(name)!r}: save it as safetensors first "
                "(parscale.load and save_pretrained), and give that folder"
            )
        return gguf.load_model(file, **options)
    folder = _folder(name)
    lora = (folder / LORA).exists()
    if lora:
        _check_lora(folder)
    if _holds_adapters(folder):
        return _load_adapters(folder, quantize, options)
    family = str(PreTrainedConfig.get_config_dict(name)[0].get("model_type"))
    if family.endswith(SUFFIX):
        register_family(family.removesuffix(SUFFIX))
    if lora:  # what was missing of the model would not be told where transformers loads the LoRA beside it
        options = options | {"adapter_kwargs": {"subfolder": "none"}}
    told: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    safe: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
    source = f"model {str(name)!r}"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **safe, **options | told | _quantization(quantize))
    except RuntimeError:  # among others where experts cannot be stacked, or a tensor cannot be put into few bits
        check_experts(folder, source)
        if quantize != "none":
            _load(name, "none", options)
        raise
    model, info = loaded
    if info["mismatched_keys"]:
        check_experts(folder, source)
    check_whole(model, info, source)
    if quantize != "none":
        check_quantized(model, source)
    if lora:
        _check_found(model.load_adapter(str(folder)), folder)
    return model


def comes_with_streams(name: str | Path) -> bool:
    """Whether a model has streams, by its settings alone.

    Raises:
        InputError: there is no such model.
    """
    with _told_in_one_line("model", name):
        if gguf.find(name) is not None:
            return False
        folder = _folder(name)
        if (folder / MANIFEST).exists():
            return True
        if _holds_adapters(folder):
            return comes_with_streams(_base(folder))
        entries = PreTrainedConfig.get_config_dict(name)[0]
        return "parscale_n" in entries and not StreamsConfig.from_json(entries).is_plain


def load_tokenizer(name: str | Path) -> Any:
    """`AutoTokenizer.from_pretrained` without remote code, and with what the folder's tokenizer.json says: for some
    families, qwen2 among them, transformers puts the family's own splitting of words in its place. Adapters that have
    none have their base's.

    Raises:
        InputError: the folder or hub name has no tokenizer, or a damaged one.
    """
    with _told_in_one_line("tokenizer", name):
        if (file := gguf.find(name)) is not None:
            return gguf.load_tokenizer(file)
        folder = _folder(name)
        if _holds_adapters(folder) and not (folder / TOKENIZER).exists():
            return load_tokenizer(_base(folder))
        if get_tokenizer_config(name).get("tokenizer_class") in _AS_WRITTEN:
            return PreTrainedTokenizerFast.from_pretrained(name)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def on_accelerator(model: Any) -> Any:
    """The model, moved to the GPU or its like where this machine has one."""
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


@contextmanager
def _told_in_one_line(kind: str, name: str | Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"{kind} {str(name)!r}: its safetensors file is damaged ({first_line(error)})") from None
    except Exception as error:  # a bad file makes the libraries raise anything, down to ZeroDivisionError
        where = "" if Path(name).exists() else "no such folder here; from the hub: "
        raise InputError(f"{kind} {str(name)!r} cannot be loaded: {where}{_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):  # says the key alone
        return repr(error)
    first = first_line(error)
    if not first.rstrip().endswith(":"):
        return first
    return " ".join(map(str.strip, str(error).strip().splitlines()[:2]))  # a heading and what stands under it


def _folder(name: str | Path) -> Path:
    """Where the adapters of a repository on the hub lie here once they are fetched; else the name itself."""
    if not Path(name).exists():
        unreachable = False
        for file in (MANIFEST, LORA):
            try:
                hf_hub_download(str(name), file, local_files_only=unreachable)
            except LocalEntryNotFoundError:  # without a network every try takes many seconds
                unreachable = True
                continue
            except (OSError, ValueError, HfHubHTTPError):  # none there; transformers tells of a name that is no model
                continue
            return Path(snapshot_download(str(name), allow_patterns=_FETCHED))
    return Path(name)


def _holds_adapters(folder: Path) -> bool:
    return not (folder / "config.json").exists() and any((folder / file).exists() for file in (MANIFEST, LORA))


def _check_lora(folder: Path) -> None:
    """`peft` would take a pickle where there are no safetensors."""
    if not (folder / LORA_TENSORS).is_file():
        raise InputError(
            f"model {str(folder)!r} has no {LORA_TENSORS}, and a LoRA is loaded from nothing else; "
            "write it with peft's save_pretrained"
        )
    check_readable([folder / LORA_TENSORS])


def _base(folder: Path) -> str:
    """The model that the adapters in a folder are for; one that was named from the folder above stands beside them."""
    with _read_of(folder):
        if (folder / MANIFEST).exists():
            base = json.loads((folder / MANIFEST).read_text())["base"]["name"]
        else:
            base = json.loads((folder / LORA).read_text())["base_model_name_or_path"]
    beside = folder.parent / str(base)
    if isinstance(base, str) and not Path(base).exists() and beside.exists():
        base = str(beside)
    if not isinstance(base, str) or _holds_adapters(_folder(base)):
        raise InputError(f"model {str(folder)!r}: its base {base!r} is not a model")
    return base


@contextmanager
def _read_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"model {str(folder)!r}: its adapters' files cannot be read ({first_line(error)})") from None


def _load_adapters(folder: Path, asked: str, options: dict[str, Any]) -> Any:
    base, record = _base(folder), folder / RECORD
    with _read_of(folder):
        quantize = json.loads(record.read_text())["config"]["quantize"] if record.exists() else "none"
    if asked not in ("none", quantize):
        raise InputError(
            f"quantize={asked!r} with model {str(folder)!r}: its base was in {quantize!r} in training; leave "
            "quantize out, or give the same"
        )
    try:
        model = load_model(base, quantize=quantize, **options)
    except InputError as error:
        raise InputError(f"model {str(folder)!r}: of its base, {error}") from None
    if (folder / MANIFEST).exists():
        model = load_streams(model, folder, TRAINED if has_streams(model) else DEFAULT)
    if (folder / LORA).exists():
        adapted = _put_on_lora(model, folder)
        # a merge into few bits would round most of the LoRA away
        model = adapted.merge_and_unload() if quantize == "none" else adapted.get_base_model()
    return model


def _put_on_lora(model: Any, folder: Path) -> Any:
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError:
        raise InputError(
            f"model {str(folder)!r} is a LoRA and needs the package peft: pip install 'parscale[peft]'"
        ) from None
    settings = PeftConfig.from_pretrained(str(folder))
    settings.base_model_name_or_path = model.name_or_path  # peft warns of a base that was found beside the adapter
    adapted = get_peft_model(model, settings)
    # `PeftModel.from_pretrained` would only warn of tensors that are missing, and be silent on those that go nowhere.
    _check_found(adapted.load_adapter(str(folder), "default"), folder)
    return adapted


def _check_found(found: Any, folder: Path) -> None:
    if wrong := [*found.missing_keys, *found.unexpected_keys]:
        raise InputError(
            f"model {str(folder)!r}: {LORA_TENSORS} is not the LoRA of its {LORA} on this base, "
            f"{len(found.missing_keys)} tensors are missing and {len(found.unexpected_keys)} go nowhere, "
            f"as {wrong[0]}; fetch it again"
        )


def _quantization(bits: str) -> dict[str, Any]:
    """Keywords of `from_pretrained`."""
    if bits == "none":
        return {}
    try:
        if torch.cuda.is_available():
            from transformers import BitsAndBytesConfig

            settings: Any = BitsAndBytesConfig(
                load_in_8bit=bits == "int8",
                load_in_4bit=bits == "int4",
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        else:
            from torchao.quantization import (  # type: ignore[import-not-found]
                Int8WeightOnlyConfig,
                IntxWeightOnlyConfig,
            )
            from torchao.quantization.granularity import PerGroup  # type: ignore[import-not-found]
            from transformers import TorchAoConfig

            # torchao's packed 4-bit kernels for CPUs have no backward pass; these values lie in a byte each
            int4: Any = vars(torch)["int4"]
            in4 = IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(32))
            settings = TorchAoConfig(Int8WeightOnlyConfig() if bits == "int8" else in4)
    except ImportError as error:
        raise InputError(f"quantize={bits!r} needs a package: pip install 'parscale[quant]' ({error})") from None
    return {"quantization_config": settings, "dtype": torch.bfloat16}
