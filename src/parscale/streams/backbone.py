"""The shared backbone: the user's own model, whose forward duplicates its input, runs once, and merges (section 2.2).

Two mixins, put in front of a model's own classes (see families.py): one for the backbone, one for the causal LM.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.streams import kv
from parscale.streams.adaptive import run_hard_rows
from parscale.streams.aggregate import AggregationHead, stream_weights
from parscale.streams.attention import SUPPORTED, TAG
from parscale.streams.diversify import embedding, prefix, protocol
from parscale.streams.diversify.prefix import PrefixGenerator
from parscale.streams.diversify.projections import by_stream
from parscale.streams.generation import StreamsGeneration
from parscale.streams.hooked import check_in_memory
from parscale.streams.merge import merge
from parscale.streams.order import divide_tail, duplicate, duplicate_mask, duplicate_positions, split
from parscale.streams.quantized import streams_unquantized
from parscale.streams.state import Run, StreamState
from parscale.streams.tensors import belongs_to_streams, check_readable, refuse


def check_attention(model: PreTrainedModel, implementation: str) -> str:
    """The tagged name of an attention implementation that carries a prefix. A tag already there is kept once.

    Raises:
        InputError: the implementation would drop the prefix silently.
    """
    name = implementation.removeprefix(TAG)
    if name not in SUPPORTED:
        raise InputError(
            f"{type(model).__name__} with attention implementation {name!r}: it cannot carry the streams' prefix; "
            f"use one of {SUPPORTED}"
        )
    return TAG + name


class _HasStreams:
    """What holds of backbone and causal LM alike."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's own weights: over a frozen backbone in bfloat16 the streams train in float32."""
        own = (p for name, p in self.named_parameters() if not belongs_to_streams(name))  # type: ignore[attr-defined]
        return next(parameter.dtype for parameter in own if parameter.is_floating_point())

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Keeps the prefix through `set_attn_implementation` and loading, which would drop it silently."""
        asked = attn_implementation and attn_implementation.removeprefix(TAG)
        allowed = super()._check_and_adjust_attn_implementation(asked, *args, **kwargs)  # type: ignore[misc]
        return check_attention(self, allowed) if streams_of(self).enters_attention else allowed  # type: ignore[arg-type]

    def _set_gradient_checkpointing(
        self, *args: Any, gradient_checkpointing_func: Callable[..., Any] | None = None, **kwargs: Any
    ) -> None:
        """transformers' own. The layers that run again in the backward pass run the streams of the forward pass."""
        if gradient_checkpointing_func is not None:
            state = self.base_model.stream_state  # type: ignore[attr-defined]
            kwargs["gradient_checkpointing_func"] = partial(state.checkpointed, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(*args, **kwargs)  # type: ignore[misc]


class StreamsBackbone(_HasStreams):
    """Mixin of a backbone (`Qwen2Model`, …) that runs P streams. `last_hidden_state` is the merged one, (B, T, d).

    `hidden_states` and `attentions`, when asked for, have the P·B rows of all streams, stream-major; attentions show
    the prefix as their first n columns.
    """

    stream_state: StreamState
    aggregate_layer: AggregationHead | None
    prefix_generator: PrefixGenerator | None
    stream_embedding: nn.Parameter
    get_input_embeddings: Any
    config: Any
    training: bool

    def forward(  # the names that every decoder backbone of transformers shares
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the P active streams over a batch (B, T). Arguments and output are the model's own."""
        return self.stream_state.in_pass(
            self._run_streams,
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _run_streams(
        self,
        input_ids: Tensor | None,
        *,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Any,
        inputs_embeds: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        state = self.stream_state
        settings, run = state.config, state.run
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if past_key_values is not None and inputs is not None:
            kv.check_cache(past_key_values, state, inputs.shape[0])
        if settings.has_prefix and position_ids is None:
            position_ids = _positions(attention_mask, inputs)
        p = run.n_local
        if settings.has_embedding:
            embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            rows = (duplicate(embeds, p),)
            input_ids, inputs_embeds = None, by_stream(embedding.add, state, rows, (self.stream_embedding,))
        elif p > 1:
            input_ids = None if input_ids is None else duplicate(input_ids, p)
            inputs_embeds = None if inputs_embeds is None else duplicate(inputs_embeds, p)
        if p > 1:
            attention_mask = duplicate_mask(attention_mask, p)
            position_ids = None if position_ids is None else duplicate_positions(position_ids, p)
            if (types := kwargs.get("token_type_ids")) is not None:
                kwargs["token_type_ids"] = duplicate(types, p)
        return_dict = kwargs.pop("return_dict", None)
        output = super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        if tail := run.tail:
            prompt, others = divide_tail(output.last_hidden_state, tail)
            first = prompt[None, :, tail.places.to(prompt.device)]
            output.last_hidden_state = self._merge(torch.cat([first, split(others, tail.streams)]), run)
        elif run.streams > 1 and run.merged:
            hidden = split(output.last_hidden_state, p)
            if run.group is not None:
                hidden = run.group.gather(hidden)
            if run.first_pass is not None:
                hidden = torch.cat([run.first_pass.hidden[None], hidden])
            output.last_hidden_state = self._merge(hidden, run)
            if output.get("router_logits") is not None:
                # The load-balancing loss reads each entry as one layer's B·T tokens: P entries a layer keep it exact.
                output["router_logits"] = tuple(c for r in output["router_logits"] for c in r.chunk(p))
        kv.mark_cache(output.get("past_key_values"), state)
        if run.hidden is not None:
            run.hidden.append(output.last_hidden_state)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _merge(self, hidden: Tensor, run: Run) -> Tensor:
        row_mask = run.row_mask
        if row_mask is not None:  # beam search has several rows for each of the batch
            times, left = divmod(hidden.shape[1], row_mask.shape[1])
            if left or not times:
                raise InputError(
                    f"streams are set for {row_mask.shape[1]} rows, and the batch has {hidden.shape[1]}: call "
                    "set_streams with one number, or one for each row"
                )
            row_mask = row_mask.to(hidden.device).repeat_interleave(times, dim=1)
        weights = stream_weights(hidden, self.aggregate_layer, run.smoothing, row_mask, run.temperature)
        if run.observer is not None:
            run.observer(hidden, weights)
        return merge(hidden, weights)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """transformers' hook for the parameters that a checkpoint lacks."""
        super()._init_weights(module)  # type: ignore[misc]
        self.init_stream_parameters(module)

    def init_stream_parameters(self, module: nn.Module) -> None:
        """Where nothing is known of the layers' keys and values: finite always, and streams that differ."""
        std = getattr(self.config, "initializer_range", None) or 0.02
        for diversifier in protocol.ALL.values():
            diversifier.reset(module, std)
        head = getattr(self, "aggregate_layer", None)
        if head is not None and module in list(head):  # transformers asks for its layers alone, never for the head
            head.reset_parameters()

    @torch.no_grad()
    def write_generated_prefixes(self) -> None:
        """Copy what the prefix generator makes now into the banks, where inference and checkpoints find it.

        Raises:
            InputError: accelerate has offloaded the banks.
        """
        check_in_memory(self, "writing its generated prefixes")  # type: ignore[arg-type]
        for module in prefix.modules_with_prefix(self).values():  # type: ignore[arg-type]
            keys, values = self.prefix_generator(module.layer_idx)  # type: ignore[misc]
            module.prefix_k.copy_(keys)
            module.prefix_v.copy_(values)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """torch's own. The banks in it are what the prefix generator makes now, for models that have no generator."""
        if getattr(self, prefix.GENERATOR, None) is not None:
            self.write_generated_prefixes()
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: dict[str, Any], root: str, *args: Any) -> None:
        """torch's own, of one module whose tensors' names begin with `root`."""
        if getattr(self, prefix.GENERATOR, None) is not None:
            prefix.check_generator(state_dict, root)
        super()._load_from_state_dict(state_dict, root, *args)  # type: ignore[misc]

    def put_on_head(self, **place: Any) -> None:
        """Give it a new aggregation head, if its streams have one, on a device and in a dtype."""
        settings, size = self.stream_state.config, self.get_input_embeddings().embedding_dim
        self.aggregate_layer = (
            AggregationHead(settings.streams, size, settings.head_init, **place) if settings.has_head else None
        )

    def fold_prefix_generator(self) -> None:
        """Keep the generated prefixes as plain parameters and drop the generator (paper, supplement)."""
        if self.prefix_generator is not None:
            self.write_generated_prefixes()
            self.stream_state.generator = self.prefix_generator = None


class StreamsForCausalLM(StreamsGeneration, _HasStreams):
    """Mixin of a causal LM over a `StreamsBackbone`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own. With shared keys and values a prompt needs stream 0 alone, and p may differ by token."""
        state = self.base_model.stream_state
        forward = super().forward  # type: ignore[misc]
        if state.config.kv == "own":
            return forward(*args, **kwargs)
        run = state.chosen
        if run.adaptive is not None:
            run = replace(run, hidden=[])
        run, args, kwargs = kv.run_prompt_by_first_stream(self, run, args, kwargs)
        output = state.announce(run, forward, *args, **kwargs)
        return output if run.adaptive is None else run_hard_rows(forward, state, run, args, kwargs, output)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' own, which would only warn of streams that start at random. They do where they must: when a
        plain checkpoint is given streams by keyword (`parscale_n=4`); `parallelize` starts them better.

        Raises:
            InputError: tensors that are missing, stream tensors that are unexpected or of another shape; a corrupt
                safetensors file.
        """
        source = pretrained_model_name_or_path
        if source is not None:
            check_readable(sorted(Path(source).glob("*.safetensors")))
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise InputError(f"{source}: a corrupt or cut short safetensors file, fetch it again ({error})") from None
        missing = set(info["missing_keys"])
        if model.config.model_type != cls.config_class.model_type:  # type: ignore[attr-defined]
            # A plain checkpoint, loaded with `parscale_n=…`: its config keeps the base's model_type, and its streams
            # are those that `_init_weights` started.
            model.config.model_type = cls.config_class.model_type  # type: ignore[attr-defined]
            missing = {name for name in missing if not belongs_to_streams(name)}
        refuse(
            source,
            missing=missing,
            extra=filter(belongs_to_streams, info["unexpected_keys"]),
            misshaped=[m for m in info["mismatched_keys"] if belongs_to_streams(m[0]) or not ignore_mismatched_sizes],
        )
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' own, which reads the tensors of a model on the meta device."""
        with streams_unquantized(model, load_config.hf_quantizer):
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, *args, **kwargs
            )

    def save_pretrained(
        self, save_directory: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """transformers' own. A prefix generator is written beside the prefixes that it makes: a Trainer resumes with
        it, and loading takes the prefixes alone. `fold_prefix_generator` drops it before."""
        backbone: Any = self.base_model  # type: ignore[attr-defined]
        if state_dict is not None and backbone.prefix_generator is not None:
            state_dict = prefix.with_generated(backbone, state_dict)
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)  # type: ignore[misc]


def has_streams(model: Any) -> bool:
    """Whether `parallelize`, or loading, has given the model streams."""
    return isinstance(model, StreamsForCausalLM)


def streams_of(model: Any) -> StreamsConfig:
    """The streams of a parallelized model, as its `config` tells. A plain model reads as one stream, no prefix."""
    return StreamsConfig.from_json(vars(model.config))


def _positions(attention_mask: Any, inputs: Tensor | None) -> Tensor | None:
    """Positions of a padded batch, counted from each row's first real token: (B, T), or None to let the model count.

    A plain rotary model may count padding, for only distances matter to it. The prefix has no position to move along.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or inputs is None:
        return None
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.masked_fill(attention_mask == 0, 0)[:, -inputs.shape[1] :]
