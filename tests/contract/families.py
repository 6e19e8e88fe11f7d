"""The families of the contract suite, a line each: a tiny random model of the family's own class."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of one family.

    Attributes:
        name: the test's name; also the `model_type`, if that is not given.
        backends: attention implementations that carry gradients on any machine, the preferred one first.
        flex: whether the family supports flex_attention on a CPU (attention sinks need a GPU there).
        moe: whether it has a router and an auxiliary loss.
        recurrent: whether some layers keep a recurrent state instead of keys and values.
        settings: its config, on top of `COMMON`.
    """

    name: str
    model_type: str = ""
    backends: tuple[str, ...] = ("sdpa", "eager")
    flex: bool = True
    moe: bool = False
    recurrent: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        return AutoConfig.for_model(self.model_type or self.name, **(COMMON | self.settings))

    def build(self, backend: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """A random model in eval mode: the same weights on every call."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(
                self.config(), attn_implementation=backend or self.backends[0], dtype=dtype
            )
            for name, parameter in model.named_parameters():
                if name.endswith(("bias", "norm.weight", "sinks")):  # zeros and ones would hide an error
                    parameter.data += 0.1 * torch.randn_like(parameter)
        return model.eval()


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    # Large enough that attention is far from uniform, and the model's output far from its input.
    "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EAGER = ("eager",)
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
ALL_HEADS = {"num_key_value_heads": None, "head_dim": None}
"""For configs that know no such settings."""
WINDOW = {"sliding_window": 4}
"""Shorter than the prompts of the suite."""

FAMILIES = (
    Family("qwen2"),
    Family("qwen2-sliding", "qwen2", settings=WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    Family("qwen3"),
    Family("llama"),
    Family("mistral", settings=WINDOW),
    Family("phi3", settings=WINDOW),
    Family("gemma2", backends=EAGER, settings=WINDOW | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    Family("gemma3", "gemma3_text", settings=WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    Family("gpt2", flex=False, settings=ALL_HEADS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    Family("gpt_neox", settings=ALL_HEADS | {"rotary_pct": 0.5, "hidden_dropout": 0.0}),
    Family("mixtral", moe=True, settings={"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("qwen3_moe", moe=True, settings=EXPERTS),
    Family("gpt_oss", backends=EAGER, flex=False, moe=True, settings=WINDOW | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }),
    Family("deepseek_v3", settings={
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "head_dim": 8,
    }),
    Family("qwen3_next", flex=False, moe=True, recurrent=True, settings=EXPERTS | {
        "num_hidden_layers": 4, "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }),
)  # fmt: skip
