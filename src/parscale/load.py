"""Loading a model, with or without streams, so that whatever is wrong with its folder is told in one line."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from parscale.errors import InputError, first_line
from parscale.streams.backbone import has_streams
from parscale.streams.checkpoint import DEFAULT, MANIFEST, load_streams
from parscale.streams.families import SUFFIX, register_family

LORA = "adapter_config.json"
"""What `peft` calls the settings of a LoRA in its folder."""
TRAINED = "trained"
"""What streams of a folder are called on a base that came with streams of its own."""


def load_model(name: str | Path, *, quantize: str = "none", **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, safetensors only and no remote code, for streams on any family.

    A folder of adapters is loaded onto the base that it names: a LoRA of `peft` is merged into its weights, or put on
    where they are quantised, and the streams beside it are put on. `quantize` holds the backbone in "int8" or "int4":
    by torchao on a CPU, by bitsandbytes on a GPU.

    Raises:
        InputError: no such folder or hub name, a config that no model understands, a damaged checkpoint, adapters of a
            base in other bits, or the package for the quantisation is not there.
    """
    folder = Path(name)
    if _holds_adapters(folder):
        return _load_adapters(folder, quantize, options)
    try:
        family = str(PreTrainedConfig.get_config_dict(name)[0].get("model_type"))
        if family.endswith(SUFFIX):
            register_family(family.removesuffix(SUFFIX))
        return AutoModelForCausalLM.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, **options | _quantization(quantize)
        )
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"model {str(name)!r}: its safetensors file is damaged ({first_line(error)})") from None
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, StrictDataclassError) as error:
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


def _holds_adapters(folder: Path) -> bool:
    return not (folder / "config.json").exists() and any((folder / file).exists() for file in (MANIFEST, LORA))


def _load_adapters(folder: Path, asked: str, options: dict[str, Any]) -> Any:
    try:
        facts = {file: json.loads((folder / file).read_text()) for file in (MANIFEST, LORA) if (folder / file).exists()}
        base = facts[MANIFEST]["base"]["name"] if MANIFEST in facts else facts[LORA]["base_model_name_or_path"]
        record = folder / "train.json"
        quantize = json.loads(record.read_text())["config"]["quantize"] if record.exists() else "none"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"model {str(folder)!r}: its adapters' files cannot be read ({first_line(error)})") from None
    if asked not in ("none", quantize):
        raise InputError(
            f"quantize={asked!r} with model {str(folder)!r}: its base was in {quantize!r} in training; leave "
            "quantize out, or give the same"
        )
    if not isinstance(base, str) or _holds_adapters(Path(base)):
        raise InputError(f"model {str(folder)!r}: its base {base!r} is not a model")
    model = load_model(base, quantize=quantize, **options)
    if MANIFEST in facts:
        model = load_streams(model, folder, TRAINED if has_streams(model) else DEFAULT)
    if LORA in facts:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, str(folder))
        # a merge into few bits would round most of the LoRA away
        model = adapted.merge_and_unload() if quantize == "none" else adapted.get_base_model()
    return model


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
