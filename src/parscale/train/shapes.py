"""Small model shapes to pretrain from scratch, by name; any other model comes from a folder or the hub."""

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from parscale import gguf
from parscale.errors import InputError, first_line

# layers, hidden size, heads. Parameters without embeddings: about 12·layers·hidden².
SHAPES = {
    "pico": (2, 32, 2),  # 0.02 M
    "nano": (2, 64, 2),  # 0.1 M
    "micro": (4, 128, 4),  # 0.8 M
    "mini": (6, 256, 4),  # 4.7 M
    "small": (8, 512, 8),  # 25 M
    "base": (12, 768, 12),  # 85 M
}

POSITIONS = ("wpe", "embed_positions", "position_embeddings", "positions_embed")
"""What transformers calls a table of learned positions."""


def build(model: str, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedModel:
    """An untrained causal LM for a tokenizer: a shape of `SHAPES`, or the configuration found at a folder or hub name.

    Random draws come from torch's global generator.

    Raises:
        InputError: no such shape or configuration, or one whose vocabulary is smaller than the tokenizer's.
    """
    if model in SHAPES:
        layers, hidden, heads = SHAPES[model]
        config: Any = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3 // 8 * 8,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=max(512, 2 * block_size),
            initializer_range=0.5 * hidden**-0.5,  # 0.02 suits a width of 600; narrow models start too quiet with it
            tie_word_embeddings=True,
        )
    else:
        try:
            file = gguf.find(model)
            config = (
                AutoConfig.from_pretrained(model, trust_remote_code=False) if file is None else gguf.load_config(file)
            )
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise InputError(
                f"model={model!r}: give one of {tuple(SHAPES)}, a folder or a hub name ({reason})"
            ) from None
    check_vocabulary(config.vocab_size, tokenizer, model)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise InputError(f"model={model!r} is not the configuration of a causal LM ({first_line(error)})") from None


def learned_positions(model: Any) -> int | None:
    """For how many tokens a model has learned positions; None where they are computed. A prefix takes none."""
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in POSITIONS
    ]
    return min(tables, default=None)


def check_context(model: Any, block_size: int, name: str) -> None:
    """Refuse sequences that are longer than a model's table of positions.

    Raises:
        InputError: naming both lengths.
    """
    context = learned_positions(model)
    if context is not None and block_size > context:
        raise InputError(f"block_size={block_size}: {name!r} has learned positions for {context} tokens; give no more")


def check_vocabulary(vocab_size: int, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Refuse a tokenizer that can give ids which the model has no embedding for."""
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens and {model!r} has embeddings for {vocab_size}; "
            "give the model's own tokenizer"
        )
