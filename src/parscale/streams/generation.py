"""How `generate` and its kin run P streams: how many, over which rows, and with which cache."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parscale.errors import InputError
from parscale.streams.adaptive import HardTokens, check_adaptive
from parscale.streams.kv import cached_rows
from parscale.streams.order import reorder
from parscale.streams.paged import KEPT, FoldedModel


class StreamsGeneration:
    """Mixin of a causal LM over a `StreamsBackbone`: dynamic P, and the places where transformers counts rows."""

    base_model: Any
    config: Any

    @property
    def streams(self) -> int:
        """p, the number of streams that run now."""
        return self.base_model.stream_state.chosen.streams

    def set_streams(self, streams: int | Sequence[int] | HardTokens) -> None:
        """Run the first `streams` of the P trained streams from the next pass on. Free: no weight is moved.

        Several numbers are one for each row of the batches to come: a row's result is what it would be alone at its p.
        All rows run the largest p; streams that a row did not ask for get no weight in it. `HardTokens` chooses p token
        by token.

        It holds for all threads; a `generate` that is running in another keeps the p that it began with. Called
        within a `generate`, it holds to that one's end.

        A KV cache belongs to the p that filled it; with shared keys and values it goes with any.

        Raises:
            InputError: not an integer from 1 to P, or a list of such; `HardTokens` where streams have their own keys.
        """
        self.base_model.stream_state.set(**self._checked(streams))

    def _checked(self, streams: int | Sequence[int] | HardTokens) -> dict[str, Any]:
        """The fields of `Run` that say so."""
        state = self.base_model.stream_state
        hard = streams if isinstance(streams, HardTokens) else None
        if hard is not None:
            check_adaptive(self)
            self._checked(hard.streams)  # is it possible?
            streams = 1
        trained = state.config.streams
        wanted: Any = list(streams) if isinstance(streams, Sequence) else [streams]
        if not wanted or any(isinstance(p, bool) or not isinstance(p, int) or not 1 <= p <= trained for p in wanted):
            raise InputError(f"streams={streams!r} is not accepted; this model has {trained}, give 1 to {trained}")
        row_mask = None
        if len(set(wanted)) > 1:
            row_mask = torch.arange(max(wanted))[:, None] < torch.tensor(wanted)
        return {"streams": max(wanted), "row_mask": row_mask, "adaptive": hard}

    def with_streams(self, streams: int) -> Any:
        """Another model over the same weights, not copied, that runs `streams` streams whatever this one does: a draft
        model, or a server's second width. Training one trains the other.

        Raises:
            InputError: not an integer from 1 to P.
        """
        shared = [*self.parameters(), *self.buffers(), self.base_model.stream_adapters]  # type: ignore[attr-defined]
        kept = getattr(self, KEPT, None)
        other = copy.deepcopy(self, {id(one): one for one in shared} | {id(kept): None})
        # What transformers has compiled is a call of this very model.
        for compiled in ("_compiled_call", "_last_compile_config"):
            vars(other).pop(compiled, None)
        other.set_streams(streams)
        return other

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        streams: int | Sequence[int] | HardTokens | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' own `generate`, with the merged logits of all active streams.

        Args:
            inputs: the prompt (B, T), and whatever else `generate` takes.
            streams: p for this call alone; or a list, a p for each prompt; or `HardTokens`.

        Raises:
            InputError: `streams` is not from 1 to P, or there is not one for each prompt; the prompt is longer than the
                model's context.
        """
        for prompt in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
            if prompt is None:
                continue
            self._check_length(prompt.shape[1])
            if isinstance(streams, Sequence) and len(streams) != prompt.shape[0]:
                raise InputError(f"streams={streams!r} for {prompt.shape[0]} prompts: give one number for each")
        return self._with(streams, super().generate, inputs, *args, **kwargs)  # type: ignore[misc]

    def generate_batch(self, inputs: list[list[int]], *args: Any, streams: int | None = None, **kwargs: Any) -> Any:
        """transformers' own continuous batching over a paged cache. `streams`: one number; errors as in `generate`."""
        for prompt in inputs:
            self._check_length(len(prompt))
        return self._with(streams, super().generate_batch, inputs, *args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own. The manager runs p streams as they are now; a later `set_streams` does not reach it.

        Raises:
            InputError: a manager kept from before runs another p, several p are asked for, or this model cannot be
                batched so.
        """
        run = self.base_model.stream_state.chosen
        if run.row_mask is not None or run.adaptive is not None:
            raise InputError("continuous batching runs one p for all requests; give streams as one integer")
        if self.base_model.stream_state.config.is_plain:
            return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        kept = getattr(self, KEPT, None)
        if kept is not None and kept.model.streams != self.streams:
            raise InputError(
                f"streams={self.streams}: the batching manager kept from before runs {kept.model.streams}; call "
                "destroy_cached_continuous_batching_manager() first"
            )
        folded = FoldedModel(self, self.with_streams(self.streams)) if kept is None else kept.model
        return folded.init_continuous_batching(*args, **kwargs)

    def _with(
        self, streams: int | Sequence[int] | HardTokens | None, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """function(*args, **kwargs) at this p in this thread, or at what p is now, whatever other threads set."""
        state = self.base_model.stream_state
        run = state.chosen if streams is None else replace(state.chosen, **self._checked(streams))
        return state.call(run, function, *args, **kwargs)

    @property
    def cached_streams(self) -> int:
        """For how many streams a KV cache has rows."""
        return 1 if self.base_model.stream_state.config.kv == "shared" else self.streams

    def _check_length(self, tokens: int) -> None:
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit and not _stretches_positions(self.config):
            raise InputError(f"a prompt of {tokens} tokens is longer than the model's context; give at most {limit}")

    def _prepare_static_cache(self, cache_implementation: str, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        return parent._prepare_static_cache(cache_implementation, batch_size * self.cached_streams, *args, **kwargs)

    def _reorder_cache(self, past_key_values: Any, beam_idx: Tensor) -> Any:
        streams, rows = self.cached_streams, cached_rows(past_key_values)
        batch = beam_idx.numel() if rows is None else rows // streams
        past_key_values.reorder_cache(reorder(beam_idx, streams, batch))
        return past_key_values


def _stretches_positions(config: Any) -> bool:
    """Whether a RoPE scaling carries the model beyond `max_position_embeddings`."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(one, dict) for one in rope.values()) else [rope]
    return any(kind.get("rope_type", "default") != "default" for kind in kinds)
