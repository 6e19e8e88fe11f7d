"""Modules that accelerate has hooked, before or after `parallelize`: as exact as the same model without hooks.

The yardstick is the model with streams that nothing has hooked. A hook may be on the whole model, on blocks or on
leaves; it may leave weights in place, or keep them on the CPU or on disk between passes.
"""

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import parscale
from parscale import InputError, StreamsConfig
from tests.contract.conftest import parallelized
from tests.contract.families import FAMILIES, VOCABULARY, Family
from tests.small import greedy

# accelerate warns of a map's entry that is a parameter, as `stream_embedding` is.
pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")

Hook = Callable[[Any, Path], Any]
CPU = torch.device("cpu")
ALL = ("prefix", "embedding", "lora", "rank1")
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def no_notice_of_offloading() -> Iterator[None]:
    """accelerate logs that parameters are on the meta device."""
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def family(name: str) -> Family:
    return next(f for f in FAMILIES if f.name == name)


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(3))


def blocks(model: Any, **elsewhere: str) -> dict[str, str]:
    """A device map that names the children of the backbone, each layer, and the LM head."""
    backbone = model.base_model
    found = {}
    for name, child in backbone.named_children():
        layers = isinstance(child, torch.nn.ModuleList)
        found |= {f"{name}.{i}": "cpu" for i in range(len(child))} if layers else {name: "cpu"}
    found |= {name: "cpu" for name, _ in backbone.named_parameters(recurse=False)}
    prefix = model.base_model_prefix
    named = {f"{prefix}.{name}": elsewhere.get(name.replace(".", "_"), where) for name, where in found.items()}
    return named | {name: "cpu" for name, _ in model.named_children() if name != prefix}


def layer_on_disk(model: Any, folder: Path) -> Any:
    where = blocks(model)
    layer = next(name for name in where if name.endswith(".1"))
    return dispatch_model(model, where | {layer: "disk"}, offload_dir=folder)


def removed(hook: Hook) -> Hook:
    def hook_and_remove(model: Any, folder: Path) -> Any:
        remove_hook_from_submodules(hook(model, folder))
        return model

    return hook_and_remove


def root(model: Any, folder: Path) -> Any:
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offloaded(model: Any, folder: Path) -> Any:
    return cpu_offload(model, execution_device=CPU)


def preloading(kind: str) -> Hook:
    def hook(model: Any, folder: Path) -> Any:
        part = next(type(m).__name__ for m in model.modules() if type(m).__name__.endswith(kind))
        return cpu_offload(model, execution_device=CPU, preload_module_classes=[part])

    return hook


IN_PLACE: dict[str, Hook] = {
    "root": root,
    "two": lambda m, _: dispatch_model(m, {n: "cpu" for n, _ in m.named_children()}, force_hooks=True),
    "blocks": lambda m, _: dispatch_model(m, blocks(m), force_hooks=True),
    "twice": lambda m, folder: dispatch_model(root(m, folder), blocks(m), force_hooks=True),
    "cpu_offload_with_hook": lambda m, _: accelerate.cpu_offload_with_hook(m, CPU)[0],
    "root, removed": removed(root),
    "offloaded, removed": removed(offloaded),
}
"""Weights are there between passes."""
AWAY: dict[str, Hook] = {
    "cpu_offload": offloaded,
    "buffers too": lambda m, _: cpu_offload(m, execution_device=CPU, offload_buffers=True),
    "disk_offload": lambda m, folder: disk_offload(m, folder, execution_device=CPU),
    "layer on disk": layer_on_disk,
    "preloaded attention": preloading("Attention"),
    "preloaded layer": preloading("DecoderLayer"),
}
"""Weights are there while their module runs."""


@cache
def unhooked(name: str, kv: str, diversify: tuple[str, ...]) -> tuple[Any, Tensor, Tensor]:
    """A model with streams, its logits on `tokens()`, and what it writes after them."""
    model = parallelized(family(name).build(), kv=kv, diversify=diversify)
    with torch.no_grad():
        return model, model(input_ids=tokens()).logits, greedy(model, tokens(), max_new_tokens=4)


def check(model: Any, name: str, kv: str, diversify: tuple[str, ...]) -> None:
    _, logits, written = unhooked(name, kv, diversify)
    for _ in range(2):  # what a freed tensor held may still be right the first time
        torch.empty(1_000_000).fill_(1e3)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=tokens()).logits, logits, rtol=0, atol=TOLERANCE)
    assert greedy(model, tokens(), max_new_tokens=4).equal(written)


@pytest.mark.parametrize("kv", ["own", "shared"])
@pytest.mark.parametrize("hook", IN_PLACE)
def test_streams_after_hooks(hook: str, kv: str, tmp_path: Path) -> None:
    model = IN_PLACE[hook](family("qwen2").build(), tmp_path)
    check(parallelized(model, kv=kv, diversify=ALL), "qwen2", kv, ALL)


@pytest.mark.parametrize("kv", ["own", "shared"])
@pytest.mark.parametrize("hook", IN_PLACE | AWAY)
def test_streams_before_hooks(hook: str, kv: str, tmp_path: Path) -> None:
    model = parallelized(family("qwen2").build(), kv=kv, diversify=ALL)
    check((IN_PLACE | AWAY)[hook](model, tmp_path), "qwen2", kv, ALL)


@pytest.mark.parametrize("hook", AWAY)
def test_streams_after_offloading_are_refused(hook: str, tmp_path: Path) -> None:
    model = AWAY[hook](family("qwen2").build(), tmp_path)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(InputError, match=r"offload after it, or call remove_hook_from_submodules\(model\) first"):
        parscale.parallelize(model, StreamsConfig(streams=2, prefix_tokens=4))
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("kv", ["own", pytest.param("shared", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [f.name for f in FAMILIES])
def test_every_family(name: str, kv: str, tmp_path: Path) -> None:
    if kv == "shared" and family(name).recurrent:
        pytest.skip("a recurrent state cannot be shared")
    diversify = ("prefix", "lora", "rank1")
    check(parallelized(root(family(name).build(), tmp_path), kv=kv, diversify=diversify), name, kv, diversify)
    offloaded_after = offloaded(parallelized(family(name).build(), kv=kv, diversify=diversify), tmp_path)
    check(offloaded_after, name, kv, diversify)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["own", "shared"])
@pytest.mark.parametrize("diversify", [("prefix",), ("prefix", "embedding"), ("lora",), ("rank1",)])
@pytest.mark.parametrize("hook", IN_PLACE | AWAY)
def test_each_diversifier(hook: str, diversify: tuple[str, ...], kv: str, tmp_path: Path) -> None:
    model = parallelized(family("llama").build(), kv=kv, diversify=diversify)
    check((IN_PLACE | AWAY)[hook](model, tmp_path / "after"), "llama", kv, diversify)
    if hook in IN_PLACE:
        model = IN_PLACE[hook](family("llama").build(), tmp_path)
        check(parallelized(model, kv=kv, diversify=diversify), "llama", kv, diversify)


@pytest.mark.parametrize("hook", [root, offloaded])
@pytest.mark.parametrize("kv", ["own", "shared"])
def test_p_is_chosen_under_hooks(hook: Hook, kv: str, tmp_path: Path) -> None:
    """Fewer streams, another number a row, another model over the same weights, and beams."""
    plain, _, _ = unhooked("qwen2", kv, ALL)
    alone = copy.deepcopy(plain)
    model = hook(copy.deepcopy(plain), tmp_path)
    for options in ({"streams": 2}, {"streams": [1, 3]}, {"num_beams": 2}):
        wanted = greedy(alone, tokens(), max_new_tokens=4, **options)
        assert greedy(model, tokens(), max_new_tokens=4, **options).equal(wanted), options
    wanted = greedy(alone.with_streams(2), tokens(), max_new_tokens=4)
    assert greedy(model.with_streams(2), tokens(), max_new_tokens=4).equal(wanted)


def test_token_by_token_under_hooks(tmp_path: Path) -> None:
    plain, _, _ = unhooked("qwen2", "shared", ALL)
    hard = parscale.HardTokens(entropy=2.0, streams=3)
    wanted = greedy(copy.deepcopy(plain), tokens(), max_new_tokens=4, streams=hard)
    model = offloaded(copy.deepcopy(plain), tmp_path)
    assert greedy(model, tokens(), max_new_tokens=4, streams=hard).equal(wanted)


def test_a_gradient_passes_hooks_in_place(tmp_path: Path) -> None:
    """Training a model that was dispatched first gives the gradients of one that was not."""
    gradients = []
    for hook in (lambda m, _: m, root):
        model = parallelized(hook(family("qwen2").build(), tmp_path), diversify=ALL)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("where", ["cpu", "auto", "disk", "layer on disk"])
def test_saved_model_by_device_map(where: str, tmp_path: Path) -> None:
    model, _, _ = unhooked("qwen2", "own", ALL)
    model.save_pretrained(tmp_path)
    device_map: Any = {"": where} if where in ("cpu", "disk") else where
    if where == "layer on disk":
        device_map = blocks(model) | {"model.layers.1": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "away")
    check(loaded, "qwen2", "own", ALL)


def test_streams_are_loaded_onto_a_dispatched_base(tmp_path: Path) -> None:
    model, _, _ = unhooked("qwen2", "own", ALL)
    parscale.save_streams(model, tmp_path)
    check(parscale.load_streams(root(family("qwen2").build(), tmp_path), tmp_path), "qwen2", "own", ALL)


def test_an_offloaded_model_keeps_its_streams(tmp_path: Path) -> None:
    """Whatever would read or replace them is refused, and leaves the model as it was."""
    plain, _, _ = unhooked("qwen2", "own", ALL)
    parscale.save_streams(plain, tmp_path / "streams")
    model = offloaded(copy.deepcopy(plain), tmp_path)
    for call in (
        lambda: parscale.save_streams(model, tmp_path / "again"),
        lambda: parscale.load_streams(model, tmp_path / "streams", "other"),
        lambda: parscale.use_streams(model, None),
    ):
        with pytest.raises(InputError, match="accelerate has offloaded them"):
            call()
    assert not (tmp_path / "again").exists()
    check(model, "qwen2", "own", ALL)
    remove_hook_from_submodules(model)
    parscale.save_streams(model, tmp_path / "again")
    check(parscale.load_streams(family("qwen2").build(), tmp_path / "again"), "qwen2", "own", ALL)


def _compiled_backbone(model: Any) -> None:
    model.model = torch.compile(model.model, backend="eager")


def _compiled_forward(model: Any) -> None:
    model.model.forward = torch.compile(model.model.forward, backend="eager")


def _patched_forward(model: Any) -> None:
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def _patched_and_dispatched(model: Any) -> None:
    _patched_forward(model)
    root(model, Path())


def _dispatched_and_patched(model: Any) -> None:
    root(model, Path())
    _patched_forward(model)


@pytest.mark.parametrize(
    "change",
    [_compiled_backbone, _compiled_forward, _patched_forward, _patched_and_dispatched, _dispatched_and_patched],
)
def test_another_forward_of_the_backbone_is_refused(change: Callable[[Any], None]) -> None:
    """It would run the class of before, without streams."""
    model = family("qwen2").build()
    change(model)
    kind = type(model)
    with pytest.raises(InputError, match="give the model streams first, and wrap, compile or prepare it then"):
        parscale.parallelize(model, StreamsConfig(streams=2, prefix_tokens=4))
    assert type(model) is kind


def _fully_sharded_layers(model: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer)


def _fully_sharded(model: Any) -> None:
    fully_shard(model)


def _fully_sharded_backbone(model: Any) -> None:
    fully_shard(model.model)


@pytest.mark.parametrize("shard", [_fully_sharded_layers, _fully_sharded_backbone, _fully_sharded])
def test_sharded_weights_are_refused(shard: Callable[[Any], None]) -> None:
    """Streams that join sharded layers would belong to no group, and have the gradients of one process."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        model = family("qwen2").build()
        shard(model)
        with pytest.raises(InputError, match="sharded over processes; give it streams first"):
            parscale.parallelize(model, StreamsConfig(streams=2, prefix_tokens=4))
    finally:
        torch.distributed.destroy_process_group()


def test_layers_on_several_devices() -> None:
    """Every operation finds its tensors on one device: without values, in a process of its own (see there)."""
    command = [sys.executable, "-m", "tests.ecosystem.several_devices"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
