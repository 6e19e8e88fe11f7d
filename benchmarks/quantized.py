"""Linear layers with int8 or int4 weights, on torch's own CPU kernels: a token reads half of the bytes, or a quarter.

int8: one scale a row. int4: one scale and one zero point for each 32 weights of a row. Activations stay bfloat16.
"""

import torch
from torch import Tensor, nn

GROUP = 32


class QuantizedLinear(nn.Module):
    """x·Wᵀ + b with W in `bits` bits; `linear` is bfloat16, its inputs a multiple of 32, its outputs of 16."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.bits = bits
        packed, scales = (_int8 if bits == 8 else _int4)(linear.weight.detach().float())
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) → (…, outputs)."""
        rows = x.reshape(-1, x.shape[-1])
        if self.bits == 8:
            out = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.scales)
        else:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], -1)


def quantize(module: nn.Module, bits: int) -> None:
    """Replace every `nn.Linear` below `module`, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, QuantizedLinear(child, bits))
        else:
            quantize(child, bits)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales.bfloat16()


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scales = ((high - low) / 15).clamp(min=1e-8)
    codes = ((groups - low) / scales).round().to(torch.int32).flatten(1)
    # The kernel reads scale·(code − 8) + zero.
    scales_and_zeros = torch.cat([scales, low + 8 * scales], dim=-1).transpose(0, 1).contiguous().bfloat16()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scales_and_zeros
