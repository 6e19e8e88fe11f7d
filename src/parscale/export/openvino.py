"""A folded model for OpenVINO GenAI: openvino_model.xml with its state inside, and OpenVINO's own tokenizer files.

Knows the graph's form that openvino-genai turns into paged attention. That engine owns the cache, and drops whatever
the graph wants to find in it at the start: so the prefix enters as n placeholder tokens in front of every prompt, whose
keys and values are overwritten. The tokenizer and the chat template written here put them there.
"""
# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parscale.errors import InputError
from parscale.export.folded import INPUTS, FoldedDecoder
from parscale.streams.backbone import streams_of

FILE = "openvino_model.xml"
PLACEHOLDER = "<|prefix|>"
GROUP = 32
"""Weights that share a scale in int4, along the inputs of a linear layer; int8 where these are no multiple of it."""
_RT_INFO = ("parscale", "placeholders")


def write_openvino(model: Any, tokenizer: Any, folder: Path, weights: str = "float32") -> None:
    """Write the model, OpenVINO's tokenizer and detokenizer, and the files that openvino-genai reads beside them.

    Args:
        model: a causal LM in float32 that `FoldedDecoder` takes.
        tokenizer: its tokenizer, with a fast backend. It is changed: placeholders come in front of every text.
        folder: an existing folder.
        weights: "float32", "int8" or "int4" for the linear layers and the LM head.

    Raises:
        InputError: the model cannot be folded, or the packages of the extra `openvino` are not there.
    """
    try:
        import nncf  # noqa: F401 (before the work, not after it)
        import openvino
        from openvino_tokenizers import convert_tokenizer
    except ImportError as error:
        raise InputError(
            f"--to openvino needs packages that are not here: pip install 'parscale[openvino]' ({error})"
        ) from None
    placeholder = None
    if n := prefix_tokens(model):
        placeholder = put_placeholders_in_front(tokenizer, n)
    decoder = FoldedDecoder(model, "placeholders", placeholder, tokenizer.pad_token_id).eval()
    graph = stateful_graph(decoder)
    graph.set_rt_info([decoder.prefix_tokens, -1 if placeholder is None else placeholder], list(_RT_INFO))
    openvino.save_model(compress(graph, weights), folder / FILE, compress_to_fp16=False)
    tokenizer.save_pretrained(folder)
    parts = convert_tokenizer(tokenizer, with_detokenizer=True, skip_special_tokens=True)
    for part, name in zip(parts, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(part, folder / f"openvino_{name}.xml")
    model.generation_config.save_pretrained(folder)


def compress(graph: Any, weights: str) -> Any:
    """The graph with its matrices in `weights`: "float32", "int8" or "int4"."""
    import nncf

    if weights == "float32":
        return graph
    if weights == "int8":
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    other_widths = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    return nncf.compress_weights(
        graph, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP, advanced_parameters=other_widths
    )


def prefix_tokens(model: Any) -> int:
    """n, the placeholders that a prompt needs in front; 0 for a model without a prefix."""
    settings = streams_of(model)
    return settings.prefix_tokens if settings.has_prefix else 0


def put_placeholders_in_front(tokenizer: Any, n: int) -> int:
    """Let the tokenizer, and its chat template, put n placeholder tokens in front of every text. Returns their id.

    Raises:
        InputError: the tokenizer has no fast backend, or a post-processor of another kind.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{type(tokenizer).__name__} has no fast backend, which OpenVINO's tokenizers are made from")
    tokenizer.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]}, replace_extra_special_tokens=False)
    placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    tokenizer.backend_tokenizer.post_processor = _post_processor(tokenizer, placeholder, n)
    if tokenizer.chat_template is not None:  # a template's text is tokenised without the post-processor
        tokenizer.chat_template = PLACEHOLDER * n + tokenizer.chat_template
    return placeholder


def _post_processor(tokenizer: Any, placeholder: int, n: int) -> Any:
    """The tokenizer's own, with the placeholders in front of what it puts in front. One template in all: of several,
    OpenVINO's converter takes the first."""
    from tokenizers import processors

    own = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"] or {"type": "Sequence", "processors": []}
    steps = {step["type"]: step for step in (own["processors"] if own["type"] == "Sequence" else [own])}
    if unknown := steps.keys() - {"ByteLevel", "TemplateProcessing"}:
        raise InputError(f"the tokenizer's post-processors {sorted(unknown)} are not among those that can be exported")
    template = steps.get("TemplateProcessing", {"single": [{"Sequence": {"id": "A"}}], "special_tokens": {}})
    pieces = [PLACEHOLDER] * n
    for piece in template["single"]:
        pieces.append("$A" if "Sequence" in piece else piece["SpecialToken"]["id"])
    known = [(name, token["ids"][0]) for name, token in template["special_tokens"].items()]
    with_front = processors.TemplateProcessing(single=pieces, special_tokens=[*known, (PLACEHOLDER, placeholder)])
    return processors.Sequence([processors.ByteLevel(), with_front]) if "ByteLevel" in steps else with_front


def stateful_graph(decoder: FoldedDecoder) -> Any:
    """The decoder as an `openvino.Model` that holds its own cache, empty at the start, with the inputs `input_ids`,
    `attention_mask`, `position_ids` and `beam_idx` and the output `logits`: the form that openvino-genai expects."""
    import openvino
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    names = decoder.cache_names
    with torch.no_grad():
        program = torch.export.export(decoder, decoder.example(), dynamic_shapes=decoder.dynamic_shapes())
    graph = openvino.convert_model(program)
    for port, name in zip(graph.inputs, [*INPUTS, *names], strict=True):
        port.get_tensor().set_names({name})
        cache = openvino.PartialShape([-1, decoder.kv_heads, -1, decoder.head_dim])
        port.get_node().set_partial_shape(cache if name in names else openvino.PartialShape([-1, -1]))
    held = {name: name.replace("past_key_values", "present") for name in names}
    for port, name in zip(graph.outputs, ["logits", *held.values()], strict=True):
        port.get_tensor().set_names({name})
    beams = opset13.parameter([-1], np.int32, name="beam_idx")
    beams.output(0).get_tensor().add_names({"beam_idx"})
    graph.add_parameters([beams])
    for name in names:
        port = graph.input(name)
        users = port.get_target_inputs()
        reordered = opset13.gather(port, beams, np.int64(0))
        for user in users:
            user.replace_source_output(reordered.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, held)
    ids = graph.input("input_ids")
    rows = opset13.gather(opset13.shape_of(ids, output_type="i64"), np.array([0], dtype=np.int64), np.int64(0))
    empty = np.array([decoder.kv_heads, 0, decoder.head_dim], dtype=np.int64)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            start = opset13.broadcast(np.float32(0), opset13.concat([rows, empty], 0))
            node.set_arguments([start.output(0)])
    graph.validate_nodes_and_infer_types()
    return graph


class OpenVinoLogits:
    """A written model, run by OpenVINO in float32: token ids (T,) → logits (T, V), without the placeholders'."""

    def __init__(self, folder: Path) -> None:
        import openvino

        core = openvino.Core()
        graph = core.read_model(folder / FILE)
        # A list is read back as one text.
        self.placeholders, self.placeholder = map(int, graph.get_rt_info(list(_RT_INFO)).value.split())
        exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self.request = core.compile_model(graph, "CPU", exact).create_infer_request()

    def __call__(self, ids: Tensor) -> Tensor:
        n = self.placeholders
        whole = np.concatenate([np.full(n, self.placeholder, np.int64), ids.numpy()])[None]
        self.request.reset_state()
        inputs = {"input_ids": whole, "attention_mask": np.ones_like(whole), "beam_idx": np.zeros(1, np.int32)}
        inputs["position_ids"] = np.arange(whole.shape[1])[None]
        return torch.from_numpy(self.request.infer(inputs)["logits"][0, n:].copy())
