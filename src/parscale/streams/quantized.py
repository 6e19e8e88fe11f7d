"""Loading with `quantization_config`: the backbone is quantised, the streams stay in floating point.

Knows what transformers' quantisers have in common. They put modules of their own in the place of linear ones while the
model is on the meta device (the aggregation head's too), and ask for each tensor whether to quantise it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from parscale.streams.tensors import belongs_to_streams


@contextmanager
def streams_unquantized(model: Any, quantizer: Any) -> Iterator[None]:
    """While it lasts, tensors are loaded into a model that `quantizer`, if any, has prepared: those of the streams as
    they are. The projections that it replaced have handed theirs over (see around.py)."""
    if quantizer is None:
        yield
        return
    asked = quantizer.param_needs_quantization

    def needs_quantization(model: Any, param_name: str, **kwargs: Any) -> bool:
        return not belongs_to_streams(param_name) and asked(model, param_name, **kwargs)

    model.base_model.put_on_head(device="meta", dtype=model.dtype)
    quantizer.param_needs_quantization = needs_quantization
    try:
        yield
    finally:
        del quantizer.param_needs_quantization
    _let_start(model)


def _let_start(model: Any) -> None:
    """Let transformers start the stream tensors that the checkpoint lacks: quantisers mark whole modules as loaded."""
    for module in model.base_model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and belongs_to_streams(name):
                module._is_hf_initialized = parameter._is_hf_initialized = False
