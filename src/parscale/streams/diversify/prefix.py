"""The prefix bank: n learned key/value pairs per stream in front of every attention layer (paper, section 3.1).

Knows where the prefix tensors live (`<attention module>.prefix_k|prefix_v`, shape (P, Hk, n, D)) and how they start.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import initialization

from parscale.config import PREFIX_SHAPES, StreamsConfig
from parscale.errors import InputError
from parscale.streams.diversify.calibration import Calibration, LayerStatistics, evaluating
from parscale.streams.diversify.projections import place_of
from parscale.streams.state import StreamState

NEAR_IDENTITY_NATS = 1e-3
"""What a near-identity start may cost: mean KL divergence from the plain model's predictions, in nats per token."""
RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
GENERATOR = "prefix_generator"
"""What the backbone calls its `PrefixGenerator`."""
Shape = tuple[int, int, int]
"""Hk, Dk, Dv: key/value heads, size of a key, size of a value."""


def shapes_from_config(model: Any) -> dict[str, Shape]:
    """Attention module name → (Hk, Dk, Dv): what config.json lists, or else the same for every attention layer."""
    config = model.config
    listed = (getattr(config, "parscale", None) or {}).get(PREFIX_SHAPES)
    if listed is not None:
        return _checked(listed, model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = heads, size, size
    if getattr(config, "kv_lora_rank", None) is not None:  # latent attention makes keys and values for every head
        shape = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return {
        name: shape
        for name, module in model.base_model.named_modules()
        if hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention")
    }


def _checked(listed: Any, model: Any) -> dict[str, Shape]:
    """What config.json lists, which may be anything.

    Raises:
        InputError: it is not three whole numbers above 0 for modules that the model has.
    """
    known = dict(model.base_model.named_modules())
    if isinstance(listed, dict) and all(
        name in known
        and isinstance(shape, list | tuple)
        and len(shape) == 3
        and all(isinstance(size, int) and size > 0 for size in shape)
        for name, shape in listed.items()
    ):
        return {name: tuple(shape) for name, shape in listed.items()}
    raise InputError(
        f"parscale.{PREFIX_SHAPES}={listed!r} is not accepted; give three whole numbers for attention modules of "
        f"{type(model).__name__}"
    )


def check(model: Any, calibration: Calibration, config: StreamsConfig) -> None:
    """The model's attention has to go through transformers' attention interface; and prefixes at right angles need room
    for as many directions."""
    if not calibration.layers:
        raise InputError(
            f"{type(model).__name__}: its attention layers do not go through transformers' AttentionInterface, so they "
            "cannot carry a prefix; use a family that does (llama, qwen2, qwen3, mistral, phi3, gemma, gpt2, ...)"
        )
    room = config.prefix_tokens * min(min(layer.shape[1:]) for layer in calibration.layers.values())
    if config.prefix_init == "orthogonal" and config.prefixes > room:
        raise InputError(
            f"prefix_init='orthogonal' with streams={config.streams} and prefix_tokens={config.prefix_tokens}: in a "
            f"head of {type(model).__name__} only {room} are at right angles; give more tokens, or another prefix_init"
        )


def attach(model: Any, state: StreamState) -> None:
    """Give every attention module its bank, uninitialised: `prefix_k` (P, Hk, n, Dk) and `prefix_v` (P, Hk, n, Dv);
    with a shared prefix their first dimension is 1."""
    prefixes, tokens = state.config.prefixes, state.config.prefix_tokens
    for name, (heads, key_size, value_size) in shapes_from_config(model).items():
        module = model.base_model.get_submodule(name)
        place = place_of(module, model)
        module.stream_state = state
        module.prefix_k = nn.Parameter(torch.empty(prefixes, heads, tokens, key_size, **place))
        module.prefix_v = nn.Parameter(torch.empty(prefixes, heads, tokens, value_size, **place))


def detach(model: Any) -> None:
    """Take the banks away."""
    for module in modules_with_prefix(model).values():
        del module.prefix_k, module.prefix_v


@torch.no_grad()
def init(model: Any, calibration: Calibration) -> None:
    """Start as `prefix_init` says."""
    backbone = model.base_model
    settings = backbone.stream_state.config
    layers = modules_with_prefix(backbone)
    if settings.prefix_init == "near_identity":
        _start_near_identity(model, layers, calibration)
        return
    for name, module in layers.items():
        if settings.prefix_init == "text":
            init_text(module, calibration.layers[name])
        else:
            start = init_orthogonal if settings.prefix_init == "orthogonal" else init_normal
            start(module, calibration.layers[name], settings.prefix_scale)
    if settings.prefix_init == "reparameterized":
        width = model.get_input_embeddings().embedding_dim
        generator = PrefixGenerator(layers.values(), settings.prefixes, settings.prefix_tokens, width)
        for name, module in layers.items():
            generator.match(module.layer_idx, calibration.layers[name])
        backbone.prefix_generator = generator.to(device=model.device, dtype=model.dtype)
        backbone.stream_state.generator = backbone.prefix_generator
        backbone.write_generated_prefixes()


def reset(module: nn.Module, std: float) -> None:
    """Keys and values as spread as fresh weights."""
    for name in ("prefix_k", "prefix_v"):
        if isinstance(bank := getattr(module, name, None), nn.Parameter):
            initialization.normal_(bank, std=std)


def modules_with_prefix(model: nn.Module) -> dict[str, Any]:
    """Name → attention module, for all that carry a prefix, in the model's order."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "prefix_k")}


def check_generator(state: Mapping[str, Any], root: str) -> None:
    """Refuse a state to load into a backbone with a generator, which would make other prefixes than the state holds.

    Args:
        state: tensors by name.
        root: what the names of the backbone's begin with.

    Raises:
        InputError: the state holds prefixes and no generator.
    """
    names = [name.removeprefix(root).split(".") for name in state if name.startswith(root)]
    if any(name[-1] == "prefix_k" for name in names) and not any(name[0] == GENERATOR for name in names):
        raise InputError(
            "the state holds prefixes without the generator that this model makes its own with; call "
            "model.base_model.fold_prefix_generator() before loading it"
        )


def without_generator(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state whose prefixes are plain parameters. `state_dict` has written what the generator makes into them."""
    return {name: tensor for name, tensor in state.items() if GENERATOR not in name.split(".")}


@torch.no_grad()
def with_generated(backbone: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state, such as a running mean, in which the prefixes are what the generator in it makes; if it has one."""
    parts = [(name, *name.partition(f"{GENERATOR}.")) for name in state]
    weights = {leaf: state[name] for name, _, found, leaf in parts if found}
    if not weights:
        return dict(state)
    root, made = next(root for _, root, found, _ in parts if found), {}
    for name, module in modules_with_prefix(backbone).items():
        keys, values = functional_call(backbone.prefix_generator, weights, (module.layer_idx,))
        for leaf, bank in ((f"{root}{name}.prefix_k", keys), (f"{root}{name}.prefix_v", values)):
            made[leaf] = torch.empty_like(state[leaf]).copy_(bank)
    return dict(state) | made


@torch.no_grad()
def init_normal(module: Any, statistics: LayerStatistics, scale: float = 1.0) -> None:
    """Every prefix token looks like one of the layer's own: N(mean, scale·std) of its keys and values, per head and
    channel.

    A fixed std such as 0.02 is far below what trained keys have: the streams would start alike, and stay so.
    """
    for bank, mean, std in (
        (module.prefix_k, statistics.key_mean, statistics.key_std),
        (module.prefix_v, statistics.value_mean, statistics.value_std),
    ):
        bank.normal_().mul_(scale * std[:, None].to(bank)).add_(mean[:, None].to(bank))


@torch.no_grad()
def init_orthogonal(module: Any, statistics: LayerStatistics, scale: float = 1.0) -> None:
    """As `init_normal`, but in every head the streams' deviations from the mean, flattened, are at right angles."""
    init_normal(module, statistics, scale)
    for bank, mean in ((module.prefix_k, statistics.key_mean), (module.prefix_v, statistics.value_mean)):
        mean = mean[:, None].to(bank)
        deviation = (bank - mean).transpose(0, 1).flatten(2).float()  # (Hk, P, n·D)
        directions = torch.linalg.qr(deviation.mT).Q.mT  # (Hk, P, n·D); P <= n·D, as `check` has seen to
        turned = directions * deviation.norm(dim=-1, keepdim=True)
        bank.copy_(turned.transpose(0, 1).view(bank.shape).to(bank) + mean)


@torch.no_grad()
def init_text(module: Any, statistics: LayerStatistics) -> None:
    """The keys and values of n tokens of the calibration text in a row, for every stream from another place in it."""
    streams, _, n, _ = module.prefix_k.shape
    tokens = statistics.keys.shape[1]
    for stream in range(streams):
        places = (torch.arange(n, device=statistics.keys.device) + stream * tokens // streams) % tokens
        module.prefix_k[stream] = statistics.keys[:, places].to(module.prefix_k)
        module.prefix_v[stream] = statistics.values[:, places].to(module.prefix_v)


@torch.no_grad()
def init_near_identity(module: Any, statistics: LayerStatistics, ridge: float) -> None:
    """Values zero; keys that draw little attention, the less the smaller `ridge` is, plus a little noise that tells the
    streams apart. What attention they draw only shrinks the rest.

    n equal keys k draw the share a = sigmoid(q·k + ln n − z) from a query whose scores of real tokens have the
    log-sum-exp z. The keys minimise the mean of −log(1 − a) over the recorded queries, plus ridge · mean (q·k)² as it
    would be for queries of all directions: a convex problem, solved by L-BFGS. Scores equal and very negative for all
    queries are not to be had: the queries look in many directions.
    """
    keys = _keys_that_draw_least(statistics, module.prefix_k.shape[2], ridge)  # (Hk, Dk)
    noise = torch.randn(module.prefix_k.shape, dtype=torch.float64).to(keys.device)
    scale = 0.1 * statistics.key_std.double()[:, None]  # (Hk, 1, Dk)
    module.prefix_k.copy_(keys[:, None] + scale * noise)
    module.prefix_v.zero_()


def _start_near_identity(model: Any, layers: dict[str, Any], calibration: Calibration) -> None:
    """The largest ridge whose prefixes stay within `NEAR_IDENTITY_NATS` of the plain model's predictions, or else the
    best one: a prefix that drew no attention at all would get no gradient either."""
    expected = calibration.logits.float().log_softmax(-1)
    best, smallest = {}, math.inf
    for ridge in RIDGES:
        for name, module in layers.items():
            init_near_identity(module, calibration.layers[name], ridge)
        with evaluating(model), torch.no_grad():
            predicted = model(input_ids=calibration.ids, use_cache=False).logits.float().log_softmax(-1)
        divergence = (expected.exp() * (expected - predicted)).sum(-1).mean().item()
        if divergence <= NEAR_IDENTITY_NATS:
            return
        if divergence < smallest:
            best, smallest = {name: module.prefix_k.detach().clone() for name, module in layers.items()}, divergence
    for name, keys in best.items():
        layers[name].prefix_k.copy_(keys)
    logging.getLogger(__name__).warning(
        "near_identity starts %.4f nats from the plain model on the calibration batch; the aim was %g",
        smallest,
        NEAR_IDENTITY_NATS,
    )


@torch.enable_grad()
def _keys_that_draw_least(statistics: LayerStatistics, tokens: int, ridge: float) -> Float[Tensor, "hk dk"]:
    queries = statistics.queries.double()  # (Hk, N, Dk)
    offsets = math.log(tokens) - statistics.log_sums.double()  # (Hk, N)
    weight = ridge * queries.square().mean(dim=(1, 2))  # (Hk,)
    keys = torch.zeros(queries.shape[0], queries.shape[2], dtype=torch.float64, device=queries.device).requires_grad_()
    solver = torch.optim.LBFGS([keys], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        scores = (queries @ keys[..., None]).squeeze(-1)
        value = (F.softplus(scores + offsets).mean(1) + weight * keys.square().sum(1)).sum()
        value.backward()
        return value

    solver.step(loss)
    return keys.detach()


class PrefixGenerator(nn.Module):
    """Makes all layers' prefixes during training: learned vectors → Tanh MLP → keys and values (paper, supplement).

    A small shared vector behind every layer's prefix makes their gradients agree. `fold_prefix_generator` writes the
    result into the banks and drops it. What is saved before holds both, and loads without a generator.

    Args:
        layers: the attention modules that carry a bank.
        prefixes: P, or 1 for one that all streams share.
        tokens: n.
        width: size of the learned vectors and of the hidden layer.
    """

    def __init__(self, layers: Iterable[Any], prefixes: int, tokens: int, width: int) -> None:
        super().__init__()
        self.shapes = {m.layer_idx: (m.prefix_k.shape[1], m.prefix_k.shape[3], m.prefix_v.shape[3]) for m in layers}
        self.vectors = nn.Parameter(torch.randn(prefixes, tokens, width))
        self.hidden = nn.Linear(width, width)
        self.out = nn.ModuleDict(
            {str(layer): nn.Linear(width, heads * (dk + dv)) for layer, (heads, dk, dv) in self.shapes.items()}
        )

    def forward(self, layer: int) -> tuple[Float[Tensor, "p hk n dk"], Float[Tensor, "p hk n dv"]]:
        """Keys and values of the attention module with this layer index."""
        heads, dk, dv = self.shapes[layer]
        flat = self.out[str(layer)](torch.tanh(self.hidden(self.vectors)))  # (P, n, Hk·(Dk + Dv))
        keys, values = flat.split((heads * dk, heads * dv), dim=-1)
        return keys.unflatten(-1, (heads, dk)).transpose(1, 2), values.unflatten(-1, (heads, dv)).transpose(1, 2)

    @torch.no_grad()
    def match(self, layer: int, statistics: LayerStatistics) -> None:
        """Scale the output so that the layer's generated keys and values start spread like its own."""
        keys, values = self(layer)
        own = torch.cat([statistics.key_std.flatten(), statistics.value_std.flatten()])  # (Hk·(Dk + Dv),)
        made = torch.cat([keys.std((0, 2)).flatten(), values.std((0, 2)).flatten()])
        out: Any = self.out[str(layer)]
        out.weight.mul_((own.to(made) / made.clamp(min=1e-6))[:, None])
        out.bias.copy_(torch.cat([statistics.key_mean.flatten(), statistics.value_mean.flatten()]))
