"""What a user may choose about the streams, and every default; and how the choice is written in `config.json`.

The paper's names stand in `config.json` where the released checkpoints have them (`parscale_n`, `parscale_n_tokens`,
`parscale_attn_smooth`); what those cannot say goes into one dict, `parscale`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from parscale.errors import InputError

Aggregate = Literal["learned", "mean"]
HeadInit = Literal["zero", "random"]
PrefixInit = Literal["near_identity", "normal", "orthogonal", "text", "reparameterized"]
Diversifier = Literal["prefix", "embedding", "lora", "rank1"]
KV = Literal["own", "shared"]

AGGREGATES = ("learned", "mean")
HEAD_INITS = ("zero", "random")
PREFIX_INITS = ("near_identity", "normal", "orthogonal", "text", "reparameterized")
DIVERSIFIERS = ("prefix", "embedding", "lora", "rank1")
KVS = ("own", "shared")


@dataclass(frozen=True)
class StreamsConfig:
    """How many streams, what tells them apart, and how they are merged. The defaults are the paper's method.

    Args:
        streams: P, the number of parallel streams (>= 1). The one dial.
        prefix_tokens: n, learned key/value pairs per stream in front of every attention layer (paper, section 3.1).
            `streams=1, prefix_tokens=48` is the honest control (a prefix, no aggregation head);
            `streams=1, prefix_tokens=0` is the plain model.
        smoothing: ε of the aggregation weights, w ← (1 − ε)·w + ε/P (paper, section 3.2). In [0, 1].
        aggregate: "learned", an MLP that weighs the streams token by token, or "mean".
        head_init: how that MLP's last layer starts: "zero", so that all streams start with the same weight and get
            their share of the gradient, or "random".
        prefix_init: how the prefix starts: "normal" (spread like the layer's own keys and values), "orthogonal" (the
            same, and at right angles from stream to stream), "text" (the keys and values of real text, another for
            every stream), "near_identity" (the model's own loss at step 0), or "reparameterized" (a Tanh MLP makes it
            during training).
        prefix_scale: how far "normal" and "orthogonal" prefixes start from the mean of the layer's own keys and values,
            as a multiple of their spread.
        diversify: what tells the streams apart: "prefix" (the paper), "embedding" (one learned vector per stream,
            added to the token embeddings), "lora" (a low-rank update of the projections per stream) and "rank1" (scales
            on the inputs and outputs of the projections per stream). One stream has them too, but for the embedding.
        lora_rank: r of "lora".
        lora_targets: last names of the projections that "lora" is for, such as `q_proj`; with none, all that read the
            hidden state.
        kv: whose keys and values the streams attend to: each its "own" (the paper), or those of the first stream, for
            one stream's KV cache and prefill ("shared").
        shared_prefix: with shared keys and values, one prefix for all streams, as serving engines can hold it.
        plain_first: the first stream goes without a LoRA. With shared keys and values a prompt then costs what it costs
            the plain model, and with no prefix the KV cache is the plain model's own.

    Raises:
        InputError: an unknown or impossible value, or several streams with nothing to tell them apart.
    """

    streams: int = 4
    prefix_tokens: int = 48
    smoothing: float = 0.1
    aggregate: Aggregate = "learned"
    head_init: HeadInit = "zero"
    prefix_init: PrefixInit = "normal"
    prefix_scale: float = 1.0
    diversify: tuple[Diversifier, ...] = ("prefix",)
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = ()
    kv: KV = "own"
    shared_prefix: bool = False
    plain_first: bool = False

    def __post_init__(self) -> None:
        _require(_is_int(self.streams) and self.streams >= 1, "streams", self.streams, "an integer >= 1")
        _require(
            _is_int(self.prefix_tokens) and self.prefix_tokens >= 0, "prefix_tokens", self.prefix_tokens, "an int >= 0"
        )
        _require(
            _is_number(self.smoothing) and 0 <= self.smoothing <= 1, "smoothing", self.smoothing, "a number from 0 to 1"
        )
        _require(self.aggregate in AGGREGATES, "aggregate", self.aggregate, f"one of {AGGREGATES}")
        _require(self.head_init in HEAD_INITS, "head_init", self.head_init, f"one of {HEAD_INITS}")
        _require(self.prefix_init in PREFIX_INITS, "prefix_init", self.prefix_init, f"one of {PREFIX_INITS}")
        _require(
            _is_number(self.prefix_scale) and 0 < self.prefix_scale < math.inf,
            "prefix_scale",
            self.prefix_scale,
            "a number > 0",
        )
        if self.prefix_scale != 1 and self.prefix_init not in ("normal", "orthogonal"):
            raise InputError(
                f"prefix_scale={self.prefix_scale} with prefix_init={self.prefix_init!r} is not accepted; it goes with "
                "'normal' or 'orthogonal'"
            )
        chosen = _as_tuple(self.diversify)
        known = all(name in DIVERSIFIERS for name in chosen) and len(set(chosen)) == len(chosen)
        _require(known, "diversify", self.diversify, f"distinct names from {DIVERSIFIERS}")
        object.__setattr__(self, "diversify", chosen)
        _require(_is_int(self.lora_rank) and self.lora_rank >= 1, "lora_rank", self.lora_rank, "an integer >= 1")
        targets = _as_tuple(self.lora_targets)
        told = all(isinstance(name, str) for name in targets) and len(set(targets)) == len(targets)
        _require(told, "lora_targets", self.lora_targets, "distinct names of projections")
        if targets and "lora" not in chosen:
            raise InputError(f"lora_targets={targets} with diversify={chosen} is not accepted; it goes with 'lora'")
        object.__setattr__(self, "lora_targets", targets)
        _require(self.kv in KVS, "kv", self.kv, f"one of {KVS}")
        _require(isinstance(self.shared_prefix, bool), "shared_prefix", self.shared_prefix, "true or false")
        if self.shared_prefix and self.kv != "shared":
            raise InputError(f"shared_prefix=True with kv={self.kv!r} is not accepted; it goes with kv='shared'")
        _require(isinstance(self.plain_first, bool), "plain_first", self.plain_first, "true or false")
        if self.plain_first and ("lora" not in chosen or set(chosen) - {"prefix", "lora"}):
            raise InputError(
                f"plain_first=True with diversify={chosen} is not accepted; it goes with 'lora', or 'prefix' and 'lora'"
            )
        alike = {"prefix"} if self.shared_prefix else set()
        if self.streams > 1 and not set(self.diversifiers) - alike:
            raise InputError(
                f"streams={self.streams} with prefix_tokens={self.prefix_tokens}, shared_prefix={self.shared_prefix} "
                f"and diversify={chosen}: nothing tells the streams apart, so all would compute the same. Give every "
                f"stream a prefix of its own (prefix_tokens >= 1), or add one of {DIVERSIFIERS[1:]} to diversify."
            )

    @property
    def diversifiers(self) -> tuple[Diversifier, ...]:
        """Those of `diversify` that have parameters: not a prefix of no tokens, nor a lone stream's vector, nor the
        LoRA of a lone stream that is to be plain."""
        without = {"prefix"} if self.prefix_tokens == 0 else set()
        without |= {"embedding"} if self.streams == 1 else set()
        without |= {"lora"} if self.streams == 1 and self.plain_first else set()
        return tuple(name for name in self.diversify if name not in without)

    @property
    def has_prefix(self) -> bool:
        """Whether every attention layer gets prefix keys and values."""
        return "prefix" in self.diversifiers

    @property
    def prefixes(self) -> int:
        """How many prefixes every attention layer has: one a stream, or one for all."""
        return 1 if self.shared_prefix else self.streams

    @property
    def enters_attention(self) -> bool:
        """Whether attention is more than the model's own: it has a prefix in front, or streams that share keys."""
        return self.has_prefix or (self.kv == "shared" and self.streams > 1)

    @property
    def has_embedding(self) -> bool:
        """Whether every stream gets a learned vector added to its embeddings."""
        return "embedding" in self.diversifiers

    @property
    def has_head(self) -> bool:
        """Whether there is an aggregation head with parameters."""
        return self.streams > 1 and self.aggregate == "learned"

    @property
    def is_plain(self) -> bool:
        """Whether this is the user's model, untouched: one stream and nothing added."""
        return self.streams == 1 and not self.diversifiers

    def to_json(self) -> dict[str, Any]:
        """The entries of `config.json`: the three released names, and a dict `parscale` if they do not suffice."""
        extra = {
            f.name: value
            for f in fields(self)
            if f.name not in _RELEASED_NAMES and (value := getattr(self, f.name)) != f.default
        }
        if self.streams == 1 and not self.is_plain:
            extra["control"] = True
        entries: dict[str, Any] = {released: getattr(self, ours) for ours, released in _RELEASED_NAMES.items()}
        return entries | ({"parscale": _jsonable(extra)} if extra else {})

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> "StreamsConfig":
        """Read `config.json`'s entries back. In the released format `parscale_n: 1` means no prefix at all.

        Raises:
            InputError: an unknown key in the dict `parscale`, or a value that `StreamsConfig` refuses.
        """
        values = {ours: entries[released] for ours, released in _RELEASED_NAMES.items() if released in entries}
        given = entries.get("parscale") or {}
        _require(isinstance(given, Mapping), "parscale", given, "a dict of settings")
        extra = dict(given)
        extra.pop(PREFIX_SHAPES, None)
        control = extra.pop("control", False)
        known = {f.name for f in fields(cls)} - set(_RELEASED_NAMES)
        if unknown := sorted(set(extra) - known):
            raise InputError(f"unknown keys {unknown} in config.json's 'parscale'; known are {sorted(known)}")
        if values.setdefault("streams", 1) == 1 and not control:
            values["prefix_tokens"] = 0
        return cls(**values, **extra)

    def to_dict(self) -> dict[str, Any]:
        """All fields under their own names, for logs and reports."""
        return _jsonable(asdict(self))


def as_written(entries: dict[str, Any]) -> dict[str, Any]:
    """What transformers would write to `config.json`, made readable for the released code as well.

    `parscale` goes if it says nothing, and `auto_map`, for the code that it names is not in the folder. The released
    code, of before transformers 5, looks for `rope_theta`, `rope_scaling` and `torch_dtype`: without them it would
    silently take its defaults.
    """
    written = {k: v for k, v in entries.items() if k != "auto_map" and (k != "parscale" or v is not None)}
    rope = written.get("rope_parameters") or {}
    if "rope_theta" in rope:  # else one entry for each kind of layer, which the released code never knew
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        written["rope_theta"] = rope["rope_theta"]
        written["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    if "dtype" in written:
        written["torch_dtype"] = written["dtype"]
    return written


PREFIX_SHAPES = "prefix_shapes"
"""Key inside `parscale` for models whose attention layers do not all have the shape that their config tells."""

_RELEASED_NAMES = {
    "streams": "parscale_n",
    "prefix_tokens": "parscale_n_tokens",
    "smoothing": "parscale_attn_smooth",
}


def _as_tuple(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise InputError(f"{name}={value!r} is not accepted; give {accepted}")
