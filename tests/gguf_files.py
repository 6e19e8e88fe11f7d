"""A small GGUF file as llama.cpp's converter would write it, and the model whose weights are in it."""

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

TEXT = ["the quick brown fox jumps over the lazy dog", "two and two is four, and four and four is eight"] * 4
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TYPES = gguf.GGMLQuantizationType


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return made


def model(family: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": tokenizer().get_vocab_size(), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | settings)).eval()


def write(path: Path, source: Any, kind: TYPES = TYPES.F32, architecture: str | None = None) -> Path:
    """Write a llama or qwen2 model, its matrices in blocks of `kind`; the model gets the values that the file has."""
    config, family = source.config, source.config.model_type
    writer = gguf.GGUFWriter(path, architecture or family)
    writer.add_name("small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for name, weight in source.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        of = _permuted(weight, config, name) if family == "llama" else weight
        stored = TYPES.F32 if weight.ndim == 1 else kind
        blocks = gguf.quants.quantize(of.numpy(), stored)
        values = torch.tensor(gguf.quants.dequantize(blocks, stored))
        weight.copy_(_permuted(values, config, name, back=True) if family == "llama" else values)
        writer.add_tensor(_name(name), blocks, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any) -> None:
    made = tokenizer()
    tokens = [made.id_to_token(i) for i in range(made.get_vocab_size())]
    merges = [" ".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def _permuted(weight: Tensor, config: Any, name: str, back: bool = False) -> Tensor:
    """llama.cpp rotates pairs of neighbours, transformers the two halves of a head: rows of Q and K are reordered."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    halves = (-1, 2) if back else (2, -1)
    return weight.reshape(heads, *halves, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape).contiguous()


def _name(name: str) -> str:
    if not name.startswith("model.layers."):
        known = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        return known.get(name, "output.weight")
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[module]}.{kind}"
