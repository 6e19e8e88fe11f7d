"""Quantised projections on a model with streams: as if the base had been quantised first, and the streams in float.

The yardstick is the base loaded with the same `quantization_config`, then given the same streams. Most cases run on a
quantiser of the test's own, which does what those of transformers do; the others where their packages are installed.
"""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

import parscale
from parscale.streams.tensors import stream_tensors
from tests.contract.conftest import N, P, parallelized
from tests.contract.families import FAMILIES, VOCABULARY, Family

ALL = ("prefix", "embedding", "lora", "rank1")
WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
"""bitsandbytes cannot store blocks of fewer than 64 weights."""


class Rounded(nn.Linear):
    """What a quantiser puts in the place of a linear module."""

    scale: Tensor

    def __init__(self, size_in: int, size_out: int, bias: bool) -> None:
        super().__init__(size_in, size_out, bias)
        self.register_buffer("scale", torch.ones(size_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)

    def dequantized(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight.data, linear.bias = self.weight * self.scale, self.bias
        return linear


class Round(ConversionOps):
    """A weight of the checkpoint in 8 bits. All that its module has counts as loaded then, as with other libraries."""

    def convert(self, input_dict: dict[str, Any], *, model: Any, missing_keys: set[str], **_: Any) -> dict[str, Any]:
        [(name, [value])] = input_dict.items()
        module, _ = get_module_from_name(model, name)
        module.scale = value.abs().amax(1, keepdim=True) / 127
        missing_keys.discard(name.removesuffix("weight") + "scale")
        module._is_hf_initialized = True
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True
        return {name: nn.Parameter((value / module.scale).round().to(torch.int8), requires_grad=False)}


@register_quantization_config("rounded")
class RoundedConfig(QuantizationConfigMixin):
    def __init__(self, **_: Any) -> None:
        self.quant_method: Any = "rounded"


@register_quantizer("rounded")
class Rounding(HfQuantizer):
    """Replaces every linear module but the LM head while the model is on the meta device, and quantises each tensor in
    one of its modules that is not a bias: bitsandbytes does the same."""

    is_trainable: Any = True  # type: ignore[assignment]

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Rounded) and name != "bias" and not self.pre_quantized

    def get_quantize_ops(self) -> Round:
        return Round()

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not head:
                with torch.device("meta"):
                    rounded = Rounded(module.in_features, module.out_features, module.bias is not None)
                if self.pre_quantized:
                    rounded.weight = nn.Parameter(rounded.weight.to(torch.int8), requires_grad=False)
                model.set_submodule(name, rounded)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, Rounded):
                model.set_submodule(name, module.dequantized())
        return model


def bits(**settings: Any) -> Callable[[], Any]:
    return lambda: BitsAndBytesConfig(**settings)


def torchao(name: str) -> Callable[[], Any]:
    def config() -> Any:
        from torchao import quantization  # type: ignore[import-not-found]

        return transformers.TorchAoConfig(getattr(quantization, name)())

    return config


QUANTISERS: dict[str, tuple[str | None, Callable[[], Any]]] = {
    "rounded": (None, RoundedConfig),
    "bitsandbytes 8": ("bitsandbytes", bits(load_in_8bit=True)),
    "bitsandbytes 4": ("bitsandbytes", bits(load_in_4bit=True)),
    "bitsandbytes nf4": ("bitsandbytes", bits(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "torchao 8": ("torchao", torchao("Int8WeightOnlyConfig")),
    "torchao 8, activations": ("torchao", torchao("Int8DynamicActivationInt8WeightConfig")),
    "quanto 8": ("optimum.quanto", lambda: transformers.QuantoConfig(weights="int8")),
}
"""Name → its package and its settings: what quantises weights of float on a CPU, and compiles nothing first."""


def installed(package: str | None) -> bool:
    try:
        return package is None or importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def missing(package: str | None) -> Any:
    return pytest.mark.skipif(not installed(package), reason=f"{package} is not installed")


every_quantiser = pytest.mark.parametrize(
    "config", [pytest.param(config, id=name, marks=missing(package)) for name, (package, config) in QUANTISERS.items()]
)
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]


def family(name: str) -> Family:
    return next(f for f in FAMILIES if f.name == name)


def wide() -> Family:
    found = family("qwen2")
    return replace(found, settings=found.settings | WIDE)


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=tokens()).logits


def load(folder: Path, config: Callable[[], Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(), dtype=torch.float32).eval()


def given(model: Any, tensors: dict[str, nn.Parameter], **streams: Any) -> Any:
    """The model with streams of these values."""
    parallelized(model, **streams)
    with torch.no_grad():
        for name, parameter in stream_tensors(model).items():
            parameter.copy_(tensors[name])
    return model


def check(model: Any, tensors: dict[str, nn.Parameter], expected: Tensor) -> None:
    """It predicts what is expected, and its streams are the ones given, to the bit."""
    assert stream_tensors(model).keys() == tensors.keys()
    for name, parameter in stream_tensors(model).items():
        torch.testing.assert_close(parameter, tensors[name], rtol=0, atol=0, msg=name)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)


@every_quantiser
@pytest.mark.parametrize("kv", ["own", "shared"])
def test_loading_quantises_the_base_alone(config: Callable[[], Any], kv: str, tmp_path: Path) -> None:
    streams: dict[str, Any] = {"diversify": ALL, "kv": kv}
    saved = parallelized(wide().build(), **streams)
    saved.save_pretrained(tmp_path / "streams")
    wide().build().save_pretrained(tmp_path / "base")
    first = given(load(tmp_path / "base", config), stream_tensors(saved), **streams)
    loaded = load(tmp_path / "streams", config)
    check(loaded, stream_tensors(saved), logits(first))
    assert (logits(loaded) - logits(saved)).abs().max() > 1e-4, "nothing was quantised"
    assert loaded.state_dict().keys() >= stream_tensors(saved).keys()


FEW = ("qwen2", "gpt2", "mixtral", "deepseek_v3", "qwen3_next")


@pytest.mark.parametrize(
    "name", [pytest.param(f.name, marks=() if f.name in FEW else pytest.mark.slow) for f in FAMILIES]
)
def test_every_family(name: str, tmp_path: Path) -> None:
    streams: dict[str, Any] = {"diversify": ("prefix", "lora", "rank1")}
    saved = parallelized(family(name).build(), **streams)
    saved.save_pretrained(tmp_path / "streams")
    family(name).build().save_pretrained(tmp_path / "base")
    first = given(load(tmp_path / "base", RoundedConfig), stream_tensors(saved), **streams)
    check(load(tmp_path / "streams", RoundedConfig), stream_tensors(saved), logits(first))


@every_quantiser
def test_a_quantised_model_is_saved_and_loaded(config: Callable[[], Any], tmp_path: Path) -> None:
    parallelized(wide().build(), diversify=ALL).save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", config)
    if not model.hf_quantizer.is_serializable():
        pytest.skip("transformers does not save its models")
    expected, tensors = logits(model), stream_tensors(model)
    model.save_pretrained(tmp_path / "quantised")
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "quantised").eval(), tensors, expected)


@every_quantiser
def test_streams_by_keyword_on_a_quantised_base(config: Callable[[], Any], tmp_path: Path) -> None:
    """A plain checkpoint has no stream tensor: all start, although their modules count as loaded."""
    wide().build().save_pretrained(tmp_path)
    kind = type(parallelized(wide().build()))
    entries = {"parscale_n": P, "parscale_n_tokens": N, "parscale": {"diversify": list(ALL)}}
    model = kind.from_pretrained(tmp_path, quantization_config=config(), dtype=torch.float32, **entries)
    for name, parameter in stream_tensors(model).items():
        start = 1 if "stream_scale" in name else 0
        zero = name.endswith(("stream_lora_b", "bias", "aggregate_layer.2.weight"))
        deviation = (parameter - start).abs().max()
        assert (deviation == 0) if zero else (0 < deviation < 2), name
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_dequantised(kv: str, tmp_path: Path) -> None:
    """Linear modules of float come back, and get the streams."""
    parallelized(wide().build(), diversify=ALL, kv=kv).save_pretrained(tmp_path)
    model = load(tmp_path, RoundedConfig)
    expected, tensors = logits(model), stream_tensors(model)
    model.dequantize(torch.float32)
    assert not any(isinstance(module, Rounded) for module in model.modules())
    torch.testing.assert_close(logits(model), expected)
    assert all(parameter is tensors[name] for name, parameter in stream_tensors(model).items())


@pytest.mark.parametrize("diversify", [("lora",), ("rank1",), ALL])
def test_a_projection_is_replaced(diversify: tuple[str, ...]) -> None:
    """Whatever takes a projection's place gets its streams; they are trained, detached and loaded there."""
    model = parallelized(family("llama").build(), diversify=diversify)
    expected = logits(model)
    for layer in model.model.layers:
        for parent, name in ((layer.self_attn, "q_proj"), (layer.mlp, "up_proj")):
            before = getattr(parent, name)
            other = nn.Linear(before.in_features, before.out_features, bias=False)
            other.weight = before.weight
            setattr(parent, name, other)
            assert not any("stream" in key for key in vars(before) | dict(before.named_parameters()))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in stream_tensors(model).values())
    parscale.use_streams(model, None)
    torch.testing.assert_close(logits(model), logits(family("llama").build()))
    parscale.use_streams(model, "default")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


@missing("optimum.quanto")
def test_quantised_by_quanto_afterwards() -> None:
    from optimum.quanto import freeze, qint8, quantize  # type: ignore[import-not-found]

    def quantised(model: Any) -> Any:
        quantize(model, weights=qint8, exclude="*aggregate_layer*")
        freeze(model)
        return model

    model = parallelized(family("llama").build(), diversify=ALL)
    tensors = stream_tensors(copy.deepcopy(model))
    first = given(quantised(family("llama").build()), tensors, diversify=ALL)
    check(quantised(model), tensors, logits(first))
