"""Stream adapters: the streams' tensors apart from the base model, on disk and several at once on one frozen backbone.

Knows the files of an adapter, `streams.safetensors` (tensors under the names that a full checkpoint gives them) and
`streams.json` (the `parscale…` entries of config.json, and which base model they belong to), and how a base is told.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from parscale.config import StreamsConfig
from parscale.errors import InputError, first_line
from parscale.streams.attention import TAG
from parscale.streams.backbone import StreamsForCausalLM, check_attention, streams_of
from parscale.streams.families import SUFFIX, give_streams, own_config, register_family, remove_streams
from parscale.streams.hooked import check_in_memory
from parscale.streams.parallelize import check_model
from parscale.streams.tensors import (
    belongs_to_streams,
    check_readable,
    check_shapes,
    is_finite,
    is_wrapped,
    listed,
    stream_tensors,
)
from parscale.utils.files import replacing

TENSORS = "streams.safetensors"
MANIFEST = "streams.json"
DEFAULT = "default"
"""The name of the streams that a model came with."""

_ENTRIES = ("parscale_n", "parscale_n_tokens", "parscale_attn_smooth", "parscale")
_SAMPLED = 256
_PLAIN = StreamsConfig(streams=1, prefix_tokens=0)


@dataclass(frozen=True)
class Adapter:
    """One set of streams for a base model: its `parscale…` entries of config.json and its tensors by full name."""

    entries: dict[str, Any]
    tensors: dict[str, nn.Parameter]


def save_streams(model: PreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """Write the active streams of a model, and nothing of its base: megabytes.

    Args:
        model: a causal LM with streams.
        directory: made if absent. Files of that name there are replaced: the folder is whole, or refused.

    Raises:
        InputError: the model has no streams, or a LoRA of `peft` is on it.
    """
    check_unwrapped(model)
    if not isinstance(model, StreamsForCausalLM) or streams_of(model).is_plain:
        raise InputError(f"{type(model).__name__} has no streams to save; give it some with parallelize()")
    backbone: Any = model.base_model
    if backbone.prefix_generator is not None:
        backbone.write_generated_prefixes()
    tensors = {name: p.detach().cpu().contiguous() for name, p in stream_tensors(model).items()}
    manifest = {"model_type": _plain_type(model), "config": _entries(model), "base": base_identity(model)}
    directory = Path(directory)
    with replacing(directory / MANIFEST) as settings:
        settings.write_text(json.dumps(manifest, indent=2) + "\n")
        with replacing(directory / TENSORS) as file:
            save_file(tensors, file, metadata={"format": "pt"})
            # Old settings beside new tensors would be believed. Without any the folder is refused.
            (directory / MANIFEST).unlink(missing_ok=True)


def load_streams(
    model: PreTrainedModel, source: str | os.PathLike[str], name: str = DEFAULT, revision: str | None = None
) -> PreTrainedModel:
    """Put saved streams on their base model, in place, and use them. A model may hold several, one of them in use.

    Args:
        model: the base model, plain or with streams already; its own weights stay as they are. The streams take its
            dtype.
        source: a folder that `save_streams` wrote, or the name of a repository on the Hugging Face hub.
        name: what `use_streams` will call them. Streams that the model came with are called "default".
        revision: branch, tag or commit of the repository.

    Returns:
        The same object.

    Raises:
        InputError: `name` is taken; a LoRA of `peft` is on the model; `source` is incomplete or corrupt, lacks stream
            tensors, has others or some of another shape; or its streams were made on another base model, and then both
            are named. Nothing is changed then.
    """
    manifest, found = _read(source, revision)
    if not isinstance(model, StreamsForCausalLM):
        check_model(model)
    check_unwrapped(model)
    if isinstance(model, StreamsForCausalLM) and name in (held := held_streams(model)):
        raise InputError(f"name={name!r} is taken; this model holds {sorted(held)}, give another")
    _check_base(model, manifest, source)
    entries = {key: manifest["config"].get(key) for key in _ENTRIES}
    check_shapes(_expected(model, entries, source), {key: tensor.shape for key, tensor in found.items()}, source)
    _check_attention(model, entries)
    adapter = Adapter(entries, {key: nn.Parameter(tensor.to(model.dtype)) for key, tensor in found.items()})
    if not isinstance(model, StreamsForCausalLM):
        config_class, model_class = register_family(model.config.model_type)
        own_config(model).__class__ = config_class
        model.__class__ = model_class
        model.base_model.stream_adapters = {}  # type: ignore[assignment]
    model.base_model.stream_adapters[name] = adapter  # type: ignore[index]
    install(model, adapter)
    return model


def use_streams(model: PreTrainedModel, name: str | None) -> None:
    """Change to the streams loaded under `name`, all P of them; None runs the base model alone. Costs no copy.

    Training goes to the streams in use; the others wait unchanged. A KV cache belongs to the streams that filled it.

    Raises:
        InputError: nothing was loaded under that name, or a LoRA of `peft` is on the model.
    """
    check_unwrapped(model)
    held = held_streams(model) if isinstance(model, StreamsForCausalLM) else {}
    if name is not None and name not in held:
        raise InputError(f"name={name!r} is not among the streams that this model holds: {sorted(held)}")
    if name is not None:
        _check_attention(model, held[name].entries)
        install(model, held[name])
    elif held:
        install(model, Adapter({"parscale": None} | _PLAIN.to_json(), {}))


def base_identity(model: PreTrainedModel) -> dict[str, Any]:
    """Which model the streams belong to: its name, and what tells its weights from another's.

    Names and shapes of all parameters but the streams', and 256 values of each, evenly spaced; rounded to bfloat16 and
    to float16, so that a base loaded in another precision is still itself. Cheap: it reads 256 values a tensor.
    """
    shapes, hashes = hashlib.sha256(), {dtype: hashlib.sha256() for dtype in (torch.bfloat16, torch.float16)}
    for name, parameter in model.named_parameters():
        if belongs_to_streams(name):
            continue
        shapes.update(f"{name} {tuple(parameter.shape)}\n".encode())
        values = parameter.detach()
        if is_traceable_wrapper_subclass(values):  # quantised by torchao
            values = values.dequantize()
        values = values.reshape(-1)
        sample = values[:: max(1, values.numel() // _SAMPLED)].cpu()
        for dtype, digest in hashes.items():
            digest.update(sample.to(dtype).view(torch.int16).numpy().tobytes())
    return {
        "name": model.name_or_path or "unnamed",
        "shapes": shapes.hexdigest(),
        "values": {str(dtype).removeprefix("torch."): digest.hexdigest() for dtype, digest in hashes.items()},
    }


def check_unwrapped(model: nn.Module) -> None:
    """Stream tensors are found by their names, and read.

    Raises:
        InputError: a LoRA of `peft` is on the model, or accelerate has offloaded it.
    """
    check_in_memory(model, "reading or changing its streams")
    if is_wrapped(model):
        raise InputError(
            f"{type(model).__name__} has a LoRA of peft on it, which renames its modules: take the LoRA off first, "
            "with merge_and_unload() or unload()"
        )


def _check_base(model: PreTrainedModel, manifest: Mapping[str, Any], source: object) -> None:
    made, here = manifest["base"], base_identity(model)
    same_values = any(made["values"].get(dtype) == digest for dtype, digest in here["values"].items())
    if manifest["model_type"] == _plain_type(model) and made["shapes"] == here["shapes"] and same_values:
        return
    raise InputError(
        f"{source}: these streams were made on base model {_described(made, manifest['model_type'])}, not on this one, "
        f"{_described(here, _plain_type(model))}; load that base first"
    )


def _described(base: Mapping[str, Any], model_type: str) -> str:
    return f"{base['name']!r} ({model_type}, weights {base['values']['bfloat16'][:12]})"


def _read(source: str | os.PathLike[str], revision: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    paths = [_find(source, file, revision) for file in (MANIFEST, TENSORS)]
    try:
        manifest = json.loads(paths[0].read_text())
        for key, kind in (("model_type", str), ("config", dict), ("base", dict)):
            if not isinstance(manifest[key], kind):
                raise TypeError(f"{key} is not a {kind.__name__}")
        base = manifest["base"]
        if not (isinstance(base["values"]["bfloat16"], str) and base["name"] and base["shapes"]):
            raise TypeError("base is incomplete")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{paths[0]}: not what save_streams writes ({error!r})") from None
    check_readable(paths[1:])
    tensors = load_file(paths[1])
    if wrong := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise InputError(f"{paths[1]}: {wrong[0]} is no floating point tensor; not what save_streams writes")
    if broken := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise InputError(f"{paths[1]}: weights that are NaN or infinite, in {listed(broken)}")
    return manifest, tensors


def _find(source: str | os.PathLike[str], file: str, revision: str | None) -> Path:
    if Path(source).is_dir():
        path = Path(source) / file
        if not path.is_file():
            raise InputError(f"{source} has no {file}; give a folder that save_streams wrote")
        return path
    try:
        return Path(hf_hub_download(str(source), file, revision=revision))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = first_line(error)
        raise InputError(
            f"{str(source)!r} is neither a folder nor a reachable repository with {file}: {reason}"
        ) from None


def _expected(model: PreTrainedModel, entries: dict[str, Any], source: object) -> dict[str, torch.Size]:
    """The stream tensors that a checkpoint with these entries has, from a model without memory."""
    config_class, model_class = register_family(_plain_type(model))
    config = config_class.from_dict(model.config.to_dict() | entries)
    try:
        with torch.device("meta"):
            skeleton = model_class(config)
    except RuntimeError as error:
        raise InputError(f"{source}: its settings make no model ({first_line(error)})") from None
    return {name: parameter.shape for name, parameter in stream_tensors(skeleton).items()}


def _check_attention(model: Any, entries: dict[str, Any]) -> None:
    """Before anything is changed: streams that enter attention need one that carries a prefix."""
    if StreamsConfig.from_json(entries).enters_attention:
        check_attention(model, model.config._attn_implementation)


def install(model: Any, adapter: Adapter) -> None:
    """Use these streams from now on, all of them, in place of those that are in use."""
    remove_streams(model)
    for key, value in adapter.entries.items():
        setattr(model.config, key, value)
    give_streams(model)
    for name, place in stream_tensors(model).items():
        parameter = adapter.tensors[name]
        parameter.data = parameter.data.to(place.device)  # not the dtype: float32 streams train over a bfloat16 base
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)
    implementation = model.config._attn_implementation.removeprefix(TAG)
    if streams_of(model).enters_attention:
        implementation = check_attention(model, implementation)
    model.config._attn_implementation = implementation


def held_streams(model: Any) -> dict[str, Adapter]:
    """What the model holds. The streams that it came with join as "default" on the first look."""
    held = model.base_model.stream_adapters
    if not held and stream_tensors(model):
        model.base_model.fold_prefix_generator()
        held[DEFAULT] = Adapter(_entries(model), stream_tensors(model))
    return held


def _entries(model: Any) -> dict[str, Any]:
    return {key: getattr(model.config, key) for key in _ENTRIES}


def _plain_type(model: Any) -> str:
    return model.config.model_type.removesuffix(SUFFIX)
