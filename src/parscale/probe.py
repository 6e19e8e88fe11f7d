"""Do the streams differ, and are they all used? Correlation, weights, losses, and the two verdicts on known failures.

*Stream collapse*: P streams are no better than one. *Weight monoculture*: one stream gets nearly all the weight.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from parscale.errors import InputError
from parscale.output import print_json, print_table
from parscale.streams.aggregate import stream_weights
from parscale.streams.backbone import has_streams
from parscale.streams.diversify.calibration import evaluating
from parscale.streams.order import split

if TYPE_CHECKING:
    from parscale.probe_details import StreamDetails

COLLAPSE_COSINE = 0.995
"""Mean cosine of the streams' final hidden states above which they count as one."""
MONOCULTURE_WEIGHT = 0.9
"""Mean weight that the head gives one stream, ε undone, above which the others count as unused."""


@dataclass(frozen=True)
class StreamProbe:
    """What the streams of one model do on one batch. Losses are nats per token; `None` where one stream runs.

    Attributes:
        loss: of the merged prediction.
        stream_losses: of each stream predicting alone, (P,).
        weights: mean aggregation weight of each stream, (P,).
        smoothing: ε, of which every stream has ε/P of those weights whatever the head says.
        effective_streams: exp of the mean entropy of the weights, 1 to P.
        cosine: mean cosine between the final hidden states of two streams at the same token.
        layer_cosine: the same after each layer, first to last.
        error_correlation: mean Pearson correlation, over tokens, of two streams' log-losses minus the control's (the
            ρ of the paper's section 2); None without a control.
    """

    streams: int
    tokens: int
    loss: float
    stream_losses: list[float]
    weights: list[float]
    smoothing: float
    effective_streams: float
    cosine: float | None
    layer_cosine: list[float]
    error_correlation: float | None

    @property
    def collapsed(self) -> bool:
        """Whether the streams say the same: near-equal hidden states, or merged no better than the best alone."""
        if self.cosine is None:
            return False
        return self.cosine > COLLAPSE_COSINE or self.loss >= min(self.stream_losses)

    @property
    def monoculture(self) -> bool:
        """Whether one stream gets nearly all the weight that the head can give."""
        given = unsmoothed(max(self.weights), self.streams, self.smoothing)
        return self.streams > 1 and given > MONOCULTURE_WEIGHT

    @property
    def verdict(self) -> str:
        """One line for people."""
        if self.streams == 1:
            return "one stream: nothing to compare"
        found = []
        if self.collapsed:
            alike = self.cosine is not None and self.cosine > COLLAPSE_COSINE
            reason = f"cosine {self.cosine:.3f}" if alike else "merged, they are no better than the best alone"
            found.append(f"stream collapse ({reason})")
        if self.monoculture:
            found.append(f"weight monoculture (largest weight {max(self.weights):.2f})")
        return "; ".join(found) if found else "the streams differ and are used"

    def to_dict(self) -> dict[str, Any]:
        """All numbers and the verdict, for JSON."""
        return asdict(self) | {"verdict": self.verdict}


@torch.no_grad()
def probe_streams(model: Any, input_ids: Int[Tensor, "b t"], *, control: Any = None) -> StreamProbe:
    """Look at every stream of a model on a batch of token ids.

    Args:
        model: a parallelized causal LM.
        input_ids: (B, T) with T >= 2, without padding.
        control: a model (P=1 with a prefix, best) whose losses the errors are measured against; or these
            losses, (B, T−1) as `token_losses` gives them.

    Raises:
        InputError: the model has no streams or runs them on hard tokens alone, or the batch is shorter than two tokens.
    """
    if not has_streams(model):
        raise InputError(f"{type(model).__name__} has no streams; call parscale.parallelize(model, StreamsConfig(...))")
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise InputError(f"input_ids has shape {tuple(input_ids.shape)}; give (batch, length) with a length >= 2")
    if model.base_model.stream_state.chosen.adaptive is not None:
        raise InputError("the model runs all its streams on hard tokens alone; call set_streams(p) with a number")
    input_ids = input_ids.to(model.device)
    p = model.streams
    with evaluating(model):
        merged = token_losses(model(input_ids=input_ids, use_cache=False).logits, input_ids)
        with unmerged(model):
            out = model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
        layers = [split(h, p) for h in out.hidden_states[1:]]  # each (p, B, T, d), the last after the final norm
        alone = split(token_losses(out.logits, input_ids.repeat(p, 1)), p)  # (p, B, T-1)
    backbone = model.base_model
    weights = stream_weights(layers[-1], backbone.aggregate_layer, backbone.stream_state.config.smoothing)
    return StreamProbe(
        streams=p,
        tokens=merged.numel(),
        loss=merged.mean().item(),
        stream_losses=alone.mean((1, 2)).tolist(),
        weights=weights.mean((1, 2)).tolist(),
        smoothing=backbone.stream_state.config.smoothing,
        effective_streams=_entropy(weights).exp().item(),
        cosine=_mean_cosine(layers[-1]) if p > 1 else None,
        layer_cosine=[_mean_cosine(h) for h in layers] if p > 1 else [],
        error_correlation=_error_correlation(alone, control_losses(control, input_ids))
        if p > 1 and control is not None
        else None,
    )


def token_losses(logits: Float[Tensor, "b t v"], input_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t-1"]:
    """−log p of every token after the first, in nats: (B, T−1)."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none").view(
        input_ids.shape[0], -1
    )


def unsmoothed(weight: float, streams: int, smoothing: float) -> float:
    """What the head itself gives a stream of this weight: (w − ε/P) / (1 − ε). With an ε of 1 it has no say."""
    return (weight - smoothing / streams) / (1 - smoothing) if smoothing < 1 else 1 / streams


@contextmanager
def unmerged(model: Any) -> Iterator[None]:
    """While it lasts, the model's outputs have P·B rows: each stream on its own, stream-major, nothing merged."""
    with model.base_model.stream_state.using(merged=False):
        yield


def _mean_cosine(hidden: Float[Tensor, "p b t d"]) -> float:
    unit = F.normalize(hidden.float(), dim=-1)
    together = unit.sum(0).square().sum(-1).mean()  # |Σ u_p|² = P + Σ over ordered pairs of cosines
    p = hidden.shape[0]
    return ((together - p) / (p * (p - 1))).item()


def _entropy(weights: Float[Tensor, "p b t"]) -> Tensor:
    return -(weights * weights.clamp(min=1e-12).log()).sum(0).mean()


@torch.no_grad()
def control_losses(control: Any, input_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t-1"]:
    """A model's losses on every token after the first, in nats: (B, T−1). Losses are given back as they are."""
    if isinstance(control, Tensor):
        return control.to(input_ids.device)
    with evaluating(control):
        logits = control(input_ids=input_ids.to(control.device), use_cache=False).logits
    return token_losses(logits, input_ids.to(control.device)).to(input_ids.device)


def _error_correlation(alone: Float[Tensor, "p b t"], of_control: Float[Tensor, "b t"]) -> float:
    errors = alone.flatten(1) - of_control.flatten()[None]  # (p, tokens)
    pairs = torch.corrcoef(errors)
    p = pairs.shape[0]
    return ((pairs.sum() - pairs.trace()) / (p * (p - 1))).item()


def probe_model(
    name: str,
    *,
    data: Sequence[str],
    control: str | None,
    sequences: int,
    block_size: int,
    as_json: bool,
    plot: Path | None = None,
) -> StreamProbe:
    """Load a model, look at its streams on held-out text, and print what was seen: what `parscale probe` does.

    Raises:
        InputError: a model without streams, text or folders that cannot be read, or a plot that cannot be written.
    """
    # The text pipeline is not needed to probe a batch, and loads much.
    from parscale.law.plot import check_picture
    from parscale.load import load_model, load_tokenizer
    from parscale.probe_details import probe_details
    from parscale.train.data import load_text
    from parscale.train.shapes import check_context

    if sequences < 1:
        raise InputError(f"sequences={sequences} is not accepted; give an integer >= 1")
    if plot is not None:
        check_picture(plot)
    model, tokenizer = load_model(name), load_tokenizer(name)
    check_context(model, block_size, name)
    if not has_streams(model):
        raise InputError(f"model {name!r} has no streams to look at; train some on it with parscale train retrofit")
    other = None
    if control is not None:
        other = load_model(control)
        check_context(other, block_size, control)
        if load_tokenizer(control).get_vocab() != tokenizer.get_vocab():
            raise InputError(f"control {control!r} has another vocabulary than {name!r}: losses cannot be compared")
    text = load_text(list(data), tokenizer=tokenizer, block_size=block_size)
    ids = torch.as_tensor(text.validation[:sequences]["input_ids"])
    details = probe_details(model, ids, control=other)
    seen = details.probe
    if as_json:
        print_json(seen.to_dict() | {k: v for k, v in asdict(details).items() if k != "probe"})
    else:
        _print_details(details)
    if plot is not None:
        from parscale.probe_plot import draw_probe

        draw_probe(details, plot, Path(name))
    return seen


def _print_details(details: "StreamDetails") -> None:
    seen = details.probe
    columns = {
        "weight": seen.weights,
        "loss alone": seen.stream_losses,
        "loss without": details.loss_without,
        "gradient": details.gradient_share,
        "on its prefix": [sum(layers) / len(layers) for layers in zip(*details.prefix_attention, strict=True)],
    }
    shown = {name: values for name, values in columns.items() if values}
    print_table(
        f"{seen.streams} streams on {seen.tokens:,} held-out tokens: {seen.verdict}",
        [{"stream": i + 1} | {name: values[i] for name, values in shown.items()} for i in range(seen.streams)],
    )
    print(f"merged: loss {seen.loss:.4f}, {seen.effective_streams:.2f} streams in effect")
    print("losses in nats a token; gradient: share of what tells the streams apart; prefix: share of attention")
    if seen.cosine is not None:
        layers = " ".join(f"{c:.3f}" for c in seen.layer_cosine)
        print(f"cosine between streams, layer by layer: {layers}")
    if details.gain is not None and seen.error_correlation is not None:
        print(
            f"gain over the control: {details.gain:+.4f} nats; error correlation ρ = {seen.error_correlation:.3f}, for "
            f"which the paper's theory leaves {details.loss_factor:.0%} of the reducible loss"
        )
