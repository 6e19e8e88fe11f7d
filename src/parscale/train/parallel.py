"""Streams as a parallel dimension: the P streams of a batch split over processes, joined at the aggregation head.

Neighbouring ranks share a batch and run P/S streams each; every group of S ranks has its own data, as in data
parallelism. Each rank computes the same loss from the gathered states. The gather's backward pass gives a rank S times
its slice of their gradient, so that the mean over all ranks, which data parallelism takes anyway, is the exact gradient
of every parameter: of those before the gather (a rank has its streams' part) as of those behind it (each has all).
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from jaxtyping import Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from parscale.errors import InputError
from parscale.streams.backbone import has_streams, streams_of
from parscale.train.config import TrainConfig


class StreamGroup:
    """The processes that share the streams of one batch, and this one's place among them.

    Args:
        group: their process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def share(self, streams: int) -> slice:
        """Which of the active streams this process runs: a P-th part of them, in order."""
        each = streams // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather(self, hidden: Float[Tensor, "own b t d"]) -> Float[Tensor, "p b t d"]:
        """The hidden states of all streams from those of each process."""
        gathered: Any = _Gather.apply(hidden, self)
        return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: StreamGroup) -> Tensor:
        ctx.group, ctx.own = group, hidden.shape[0]
        gathered = hidden.new_empty(hidden.shape[0] * group.size, *hidden.shape[1:])
        dist.all_gather_into_tensor(gathered, hidden.contiguous(), group.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # The other ranks' gradients of this slice equal this rank's own: their sum is a product.
        first = ctx.group.rank * ctx.own
        return grads[0][first : first + ctx.own] * ctx.group.size, None


def check_launch(config: TrainConfig) -> None:
    """Refuse, before any work, what the launcher that was used cannot do.

    Raises:
        InputError: names the setting.
    """
    if config.control and config.stream_parallel > 1:
        raise InputError(
            f"control with stream_parallel={config.stream_parallel}: its one stream cannot be split; run it apart"
        )
    if config.balance.fewer_streams and config.stream_parallel > 1:
        raise InputError(
            f"fewer_streams={config.balance.fewer_streams} with stream_parallel={config.stream_parallel}: not every "
            "number of streams can be split evenly; leave one of the two out"
        )
    if _asked_for("DEEPSPEED"):
        for name in ("save_every", "resume"):
            if getattr(config, name):
                raise InputError(
                    f"{name}={getattr(config, name)} under DeepSpeed: its state cannot be kept; take FSDP2"
                )
    if _asked_for("FSDP") and processes() > 1:
        unsharded = {"peft": "none", "quantize": "none"}
        for name, accepted in unsharded.items():
            if getattr(config, name) != accepted:
                raise InputError(
                    f"{name}={getattr(config, name)!r} under FSDP: its weights cannot be sharded; take DDP"
                )
        if config.streams.prefix_init == "reparameterized":
            raise InputError("prefix_init='reparameterized' under FSDP: it cannot be sharded; take another, or DDP")


def check_stream_parallel(model: Any, size: int, processes: int) -> None:
    """Refuse, before the first step, a split that does not come out even.

    Args:
        model: the model that trains.
        size: S, processes that share the streams of a batch.
        processes: all that were started.

    Raises:
        InputError: naming the numbers, or what of the model cannot be split.
    """
    if size == 1:
        return
    streams = model.streams if has_streams(model) else 1
    if size > streams or streams % size:
        allowed = [n for n in range(1, streams + 1) if streams % n == 0]
        raise InputError(f"stream_parallel={size} with {streams} streams: every process needs as many; give {allowed}")
    if processes % size:
        raise InputError(
            f"stream_parallel={size} with {processes} process{'es' * (processes > 1)}: start a multiple of {size}, "
            "with torchrun or accelerate launch"
        )
    if streams_of(model).kv == "shared":
        raise InputError(f"stream_parallel={size} with kv='shared': all streams need stream 0's keys; use kv='own'")
    if getattr(model.config, "output_router_logits", False):
        raise InputError(
            f"stream_parallel={size} with a router's loss: it needs all streams; set output_router_logits=False"
        )


def split_streams(model: Any, size: int) -> DeviceMesh:
    """Let this process run its share of the model's streams from now on; `torch.distributed` must be initialised.

    Args:
        model: a parallelized causal LM.
        size: S, a divisor of P and of the number of processes.

    Returns:
        A mesh with the dimensions `data` and `streams`.
    """
    shape = (dist.get_world_size() // size, size)
    mesh = init_device_mesh(model.device.type, shape, mesh_dim_names=("data", "streams"))
    model.base_model.stream_state.set(group=StreamGroup(mesh["streams"].get_group()))
    return mesh


def same_batch_for(accelerator: Any, size: int) -> None:
    """Give neighbouring ranks, `size` of them, the same batches: Accelerate's loader does so for tensor parallelism."""
    shape = (dist.get_world_size() // size, size)
    mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("dp_replicate", "tp"))
    accelerator._prepare_device_mesh = lambda: mesh


def shard_on_cpu_too(accelerator: Any) -> bool:
    """Accelerate takes FSDP for accelerators alone, and would silently run DDP. gloo carries FSDP2 as well.

    Returns whether this run asked for it, with `accelerate launch --use_fsdp` or its environment variables.
    """
    state = accelerator.state
    if not _asked_for("FSDP") or state.distributed_type != DistributedType.MULTI_CPU:
        return False
    state._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
    state._shared_state["distributed_type"] = DistributedType.FSDP
    return True


def mix_precision_of_shards(accelerator: Any) -> None:
    """FSDP2 in bfloat16, as asked for, with two things in float32 that Accelerate would round: sums of gradients over
    processes, and what the model returns, the loss."""
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def check_zero_stage(accelerator: Any) -> None:
    """Refuse, before the first step, DeepSpeed's stage 3: its parameters would be saved as empty ones.

    Raises:
        InputError: names the stage.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise InputError("zero_stage=3 shards the weights where they cannot be saved; take zero_stage 2, or FSDP2")


def whole_parameters(model: Any) -> dict[str, Tensor]:
    """Every parameter of a sharded model by name, whole and on the CPU. All processes call it together."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: p.detach().full_tensor().cpu() for name, p in model.named_parameters()}


def _asked_for(launcher: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{launcher}", "false").lower() == "true"


def processes() -> int:
    """How many processes the launcher started, before any of them has met the others."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this one writes files and speaks."""
    return int(os.environ.get("RANK", "0")) == 0
