"""A folded model for ONNX Runtime GenAI: model.onnx with its weights beside it, genai_config.json and the tokenizer.

Knows the names that onnxruntime-genai expects, and how the weights of the linear layers become 8 or 4 bits there. The
prefix is a constant of the graph: the engine's cache, positions and prompts are a plain model's.
"""
# pyright: reportMissingImports=false

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parscale.errors import InputError
from parscale.export.folded import INPUTS, FoldedDecoder
from parscale.generate import end_tokens

FILE = "model.onnx"
GROUP = 32
"""Weights that share a scale, along the inputs of a linear layer."""
_OPSET = 21


def write_onnx(model: Any, tokenizer: Any, folder: Path, weights: str = "float32") -> None:
    """Write `model.onnx`, `model.onnx.data`, `genai_config.json` and the tokenizer.

    Args:
        model: a causal LM in float32 that `FoldedDecoder` takes.
        tokenizer: its tokenizer.
        folder: an existing folder.
        weights: "float32", "int8" or "int4" for the linear layers and the LM head.

    Raises:
        InputError: the model cannot be folded, or the packages of the extra `onnx` are not there.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise InputError(
            f"--to onnx needs packages that are not here: pip install 'parscale[onnx]' ({error})"
        ) from None
    stops = [token for token in end_tokens(model, tokenizer) if 0 <= token < model.config.vocab_size]
    # Where no stop token is named the engine takes token 0 for one, and it takes no id beyond the logits' columns: so
    # the logits get one column more, of a token that is never chosen.
    never = None if stops else model.config.vocab_size
    decoder = FoldedDecoder(model, placeholder=never).eval()
    if decoder.lm_head.weight is decoder.embed.weight:
        decoder.lm_head = copy.deepcopy(decoder.lm_head)  # a matrix that is looked up too would not be quantised
    past = decoder.cache_names
    with torch.no_grad():
        program: Any = torch.onnx.export(
            decoder,
            decoder.example(),
            input_names=[*INPUTS, *past],
            output_names=["logits", *(name.replace("past_key_values", "present") for name in past)],
            dynamic_shapes=decoder.dynamic_shapes(),
            dynamo=True,
            opset_version=_OPSET,
            verbose=False,
        )
    save(quantize(program.model_proto, weights), folder)
    tokenizer.save_pretrained(folder)
    (folder / "genai_config.json").write_text(json.dumps(_genai_config(model, decoder, stops), indent=2) + "\n")


def quantize(graph: Any, weights: str) -> Any:
    """The graph with every product with a constant matrix in `weights`: "float32", or "int8" or "int4", rounded to
    nearest, with activations in 8 bits."""
    if weights == "float32":
        return graph
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    bits = int(weights.removeprefix("int"))
    quantizer = MatMulNBitsQuantizer(graph, bits=bits, block_size=GROUP, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    return quantizer.model.model


def save(graph: Any, folder: Path) -> None:
    """Write `model.onnx`, with its weights beside it."""
    import onnx

    onnx.save_model(graph, str(folder / FILE), save_as_external_data=True, location=FILE + ".data")


def _genai_config(model: Any, decoder: FoldedDecoder, stops: list[int]) -> dict[str, Any]:
    """What onnxruntime-genai reads: to it, a plain decoder with the folded heads."""
    config = model.config
    stops = stops or [config.vocab_size]
    length = config.max_position_embeddings
    return {
        "model": {
            "bos_token_id": stops[0] if config.bos_token_id is None else config.bos_token_id,
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": FILE,
                "head_size": decoder.head_dim,
                "hidden_size": config.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": decoder.heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": decoder.kv_heads,
            },
            "eos_token_id": stops,
            "pad_token_id": stops[0] if config.pad_token_id is None else config.pad_token_id,
            "type": config.model_type.removesuffix("_parscale"),
            "vocab_size": decoder.vocab_size + decoder.missing_logits,
        },
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False},
    }


class OnnxLogits:
    """A written model, run by ONNX Runtime without a cache: token ids (T,) → logits (T, V)."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])

    def __call__(self, ids: Tensor) -> Tensor:
        tokens = len(ids)
        inputs = {
            "input_ids": ids[None].numpy(),
            "attention_mask": np.ones((1, tokens), np.int64),
            "position_ids": np.arange(tokens)[None],
        }
        for held in self.session.get_inputs()[len(inputs) :]:
            inputs[held.name] = np.zeros((1, held.shape[1], 0, held.shape[3]), np.float32)
        return torch.from_numpy(self.session.run(["logits"], inputs)[0][0])
