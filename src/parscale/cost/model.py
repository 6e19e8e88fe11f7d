"""Derived costs of a request: which shape, how served, on what machine; the arithmetic itself is in formulas.py."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from parscale import gguf
from parscale.cost import formulas
from parscale.cost.hardware import Hardware, hardware_of
from parscale.errors import InputError

GIB = 2**30
Kv = Literal["own", "shared"]
Accounting = Literal["released", "counted"]
KV: tuple[Kv, ...] = ("own", "shared")
ACCOUNTING: tuple[Accounting, ...] = ("released", "counted")
FLOPS_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.7, 0.9  # the released analysis' (section 3.3 of the paper)

DTYPES = {"fp32": (4.0, 4.0), "bf16": (2.0, 2.0), "fp16": (2.0, 2.0), "int8": (1.0, 2.0), "int4": (0.53125, 2.0)}
"""Bytes a projection weight, and bytes of everything else (embedding, norms, head, activations, cache). int4 is weights
in 4 bits with one 16-bit scale for 64 of them; int8 and int4 compute in 16 bits."""


@dataclass(frozen=True)
class Shape:
    """A decoder with gated MLP and RMSNorm. `untied`: the LM head has a matrix of its own. `bias`: on q, k and v."""

    hidden: int
    intermediate: int
    layers: int = 36
    heads: int = 16
    kv_heads: int = 2
    head_dim: float = 0
    vocab: int = 151936
    untied: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden / self.heads)

    def params(self, streams: int = 1, prefix_tokens: int = 48) -> int:
        """N as the law counts it: non-embedding parameters, prefixes and aggregation head included."""
        return round(formulas.total_params(asdict(self), streams, prefix_tokens))


PAPER_SHAPES = {
    "0.5B": Shape(896, 4864),
    "0.7B": Shape(1024, 5504),
    "1.1B": Shape(1280, 6912),
    "1.6B": Shape(1536, 8320),
    "2.8B": Shape(2048, 11008),
    "4.4B": Shape(2560, 13824),
}


_TIED = ("gemma", "ernie4_5", "smollm3")
"""Families with a gated MLP whose head is tied where a config does not say."""
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Workload:
    """How a model is served.

    `batch` requests at once, each of `input` prompt tokens and `output` new ones. `prefix_tokens`: of each stream, when
    there are several. `dtype`: one of DTYPES. `kv`: every stream has its "own" keys and values or one stream's are
    "shared" by all. `accounting`: "released" gives the paper's numbers, "counted" this library's (docs/cost.md).
    Efficiencies: achieved share of the machine's peak FLOP/s and bytes/s.
    """

    streams: int = 1
    batch: int = 1
    input: int = 64
    output: int = 64
    prefix_tokens: int = 48
    dtype: str = "bf16"
    kv: Kv = "own"
    accounting: Accounting = "released"
    flops_efficiency: float = FLOPS_EFFICIENCY
    bandwidth_efficiency: float = BANDWIDTH_EFFICIENCY

    def __post_init__(self) -> None:
        for name, least in (("streams", 1), ("batch", 1), ("input", 1), ("output", 1), ("prefix_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} is {value!r}: an integer of at least {least} is needed")
        for name in ("flops_efficiency", "bandwidth_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}: a share of the peak, over 0 and up to 1, is needed"
                )
        for name, known in (("dtype", DTYPES), ("kv", KV), ("accounting", ACCOUNTING)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r} is not known: choose one of {', '.join(known)}")

    def terms(self) -> dict[str, float]:
        """`w` of the formulas."""
        weight, value = DTYPES[self.dtype]
        return {
            "streams": self.streams,
            "batch": self.batch,
            "input": self.input,
            "output": self.output,
            "prefix": self.prefix_tokens,
            "weight": weight,
            "value": value,
            "shared": int(self.kv == "shared"),
            "counted": int(self.accounting == "counted"),
        }

    def machine(self, hardware: Hardware) -> dict[str, float]:
        """`m` of the formulas: what the hardware achieves."""
        flops = hardware.flops32 if self.dtype == "fp32" else hardware.flops
        return {
            "flops": flops * self.flops_efficiency,
            "bandwidth": hardware.bandwidth * self.bandwidth_efficiency,
        }


def cost(shape: Shape, workload: Workload, hardware: str | Path | Hardware = "a100-80g") -> dict[str, Any]:
    """One row: `params` (N), `streams`, `batch`, `in`, `out`, `memory_gib` (GiB) and `latency_s` (seconds, the whole
    request), and their parts under `memory` (GiB) and `latency` (seconds; `decode_step` is one output token)."""
    s, w, m = asdict(shape), workload.terms(), workload.machine(hardware_of(hardware))
    memory = {name: value / GIB for name, value in formulas.memory(s, w).items()}
    latency = formulas.latency(s, w, m)
    return {
        "params": shape.params(workload.streams, workload.prefix_tokens),
        "streams": workload.streams,
        "batch": workload.batch,
        "in": workload.input,
        "out": workload.output,
        "memory_gib": memory.pop("total"),
        "latency_s": latency.pop("total"),
        "memory": memory,
        "latency": latency,
    }


def cost_table(
    model: str | Path | Shape,
    streams: Iterable[int],
    batches: Iterable[int],
    workload: Workload,
    hardware: str | Path | Hardware = "a100-80g",
) -> list[dict[str, Any]]:
    """`cost` for every pair of streams and batch, in that order; the rest is as `workload` says."""
    shape, machine = shape_of(model), hardware_of(hardware)
    return [cost(shape, work, machine) for work in workloads(workload, streams, batches)]


def workloads(workload: Workload, streams: Iterable[int], batches: Iterable[int]) -> list[Workload]:
    """`workload` at every pair of streams and batch, in that order."""
    chosen = {"streams": list(streams), "batch": list(batches)}
    for name, values in chosen.items():
        if not values:
            raise InputError(f"{name} is empty: one or more integers of at least 1 are needed")
    return [replace(workload, streams=p, batch=b) for p in chosen["streams"] for b in chosen["batch"]]


def shape_of(model: str | Path | Shape) -> Shape:
    """The shape of a paper's size ("0.5B" … "4.4B"), of a config.json or the folder with it, of a GGUF file, or of a
    model's hub name.

    Raises InputError for what is none of these, for a config's field that is no number of what it counts, and for
    decoders that the formulas do not describe (experts, an MLP without a gate).
    """
    if isinstance(model, Shape):
        return model
    by_name = {name.lower(): shape for name, shape in PAPER_SHAPES.items()}
    if str(model).lower() in by_name:
        return by_name[str(model).lower()]
    whole = _read_config(model)
    config = whole.get("text_config", whole)
    if not isinstance(config, dict):
        raise InputError(f"model {str(model)!r}: text_config is {config!r}; an object is needed")
    if any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise InputError(f"model {str(model)!r} is a mixture of experts: the formulas describe dense decoders only")
    needed = (*_SIZES, "rms_norm_eps")
    missing = [key for key in needed if key not in config]
    if missing:
        raise InputError(
            f"model {str(model)!r} has no {missing[0]!r}: a decoder with RMSNorm and a gated MLP is needed"
        )
    optional = [key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None]
    for key in (*_SIZES, *optional):
        if not isinstance(config[key], int) or isinstance(config[key], bool) or config[key] < 1:
            raise InputError(f"model {str(model)!r}: {key} is {config[key]!r}; an integer of at least 1 is needed")
    for one in (whole, config):
        for key, kind, wanted in (("model_type", str, "a text"), ("tie_word_embeddings", bool, "true or false")):
            if not isinstance(one.get(key, kind()), kind):
                raise InputError(f"model {str(model)!r}: {key} is {one[key]!r}; {wanted} is needed")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return Shape(
        hidden=hidden,
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden / heads,
        vocab=config["vocab_size"],
        untied=not _is_tied(whole, config),
        bias=bool(config.get("attention_bias", config.get("model_type", "").startswith("qwen2"))),
    )


def _is_tied(whole: dict[str, Any], text: dict[str, Any]) -> bool:
    """As transformers reads it: what a config leaves out has the family's default, and a model with a part for text is
    tied where either of its two configs says so."""
    said = [config["tie_word_embeddings"] for config in (whole, text) if "tie_word_embeddings" in config]
    if said:
        return any(said)
    return whole.get("model_type", text.get("model_type", "")).startswith(_TIED)


def _read_config(model: str | Path) -> dict[str, Any]:
    if (file := gguf.find(model)) is not None:
        return gguf.load_config(file).to_dict()
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        path = _download_config(str(model))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"model {str(model)!r}: its config is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"model {str(model)!r}: its config holds no keys: an object with hidden_size, … is needed")
    return config


def _download_config(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise InputError(
            f"model {name!r} is not known: give a size of the paper ({', '.join(PAPER_SHAPES)}), a config.json, "
            "a folder with one, a GGUF file, or a model's hub name (owner/name)"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model {name!r} cannot be read from the hub ({type(error).__name__}): is the name right, "
            "and is there a network?"
        ) from None
