"""Publishing on the Hugging Face hub: a whole model or its streams alone, with a card that says what was measured."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import PreTrainedModel

from parscale.errors import InputError
from parscale.streams.backbone import streams_of
from parscale.streams.checkpoint import save_streams
from parscale.streams.diversify.prefix import without_generator

REQUIRED = ("base", "tokens", "loss", "control_loss")
OPTIONAL = ("data", "license", "language")

_CARD = """---
{front}
---

# {name}

{streams} parallel streams ([ParScale, arXiv 2505.10475](https://arxiv.org/abs/2505.10475)) on `{base}`.

| | |
|---|---|
| base model | `{base}` |
| P, streams | {streams} |
| prefix tokens a stream and layer | {prefix_tokens} |
| what tells the streams apart | {diversify} |
| tokens trained on | {tokens} |
| held-out loss, nats per token | {loss} |
| the control's: one stream with a prefix, the same tokens | {control_loss} |
| gain over the control | {gain} |
{data}
```python
import parscale
from transformers import AutoModelForCausalLM

{load}
model.generate(..., streams={streams})  # or fewer
```
"""


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    facts: Mapping[str, Any],
    *,
    streams_only: bool = False,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload a model with streams, or its streams alone, together with a model card.

    Args:
        model: a causal LM with streams.
        repo_id: "user/name"; made if absent.
        facts: what the card states: `base` (the base model's name), `tokens` (trained on), `loss` and `control_loss`
            (held-out, nats per token; None if not measured); and if wished `data`, `license`, `language`.
        streams_only: upload what `save_streams` writes instead of the whole model.
        private: for a repository that is made now; by default the account's setting.
        token: of the account; by default the one that `hf auth login` stored.

    Returns:
        The address of the commit.

    Raises:
        InputError: `facts` lacks a fact or has an unknown one, or the model has no streams.
    """
    card = model_card(model, repo_id, facts, streams_only=streams_only)
    with TemporaryDirectory() as folder:
        if streams_only:
            save_streams(model, folder)
        else:
            model.save_pretrained(folder, state_dict=without_generator(model.state_dict()))
        Path(folder, "README.md").write_text(str(card), encoding="utf-8")
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        message = f"{'Streams' if streams_only else 'Model'} with P={streams_of(model).streams}"
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))


def model_card(
    model: PreTrainedModel, repo_id: str, facts: Mapping[str, Any], *, streams_only: bool = False
) -> ModelCard:
    """The card that `push_to_hub` uploads. Arguments and errors as there."""
    if missing := [name for name in REQUIRED if name not in facts]:
        raise InputError(f"facts lacks {missing}; a card states {REQUIRED}, None for a loss that was not measured")
    if unknown := sorted(set(facts) - {*REQUIRED, *OPTIONAL}):
        raise InputError(f"facts has unknown {unknown}; known are {REQUIRED + OPTIONAL}")
    settings = streams_of(model)
    if settings.is_plain:
        raise InputError(f"{type(model).__name__} has no streams to publish; give it some with parallelize()")
    front = ModelCardData(
        base_model=facts["base"],
        license=facts.get("license"),
        language=facts.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["parscale", "parallel-scaling"],
    )
    load = f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")'
    if streams_only:
        load = f'model = AutoModelForCausalLM.from_pretrained("{facts["base"]}")\n'
        load += f'parscale.load_streams(model, "{repo_id}")'
    return ModelCard(
        _CARD.format(
            front=front.to_yaml(),
            name=repo_id.rpartition("/")[2],
            base=facts["base"],
            streams=settings.streams,
            prefix_tokens=settings.prefix_tokens,
            diversify=", ".join(settings.diversifiers),
            tokens=f"{facts['tokens']:,}",
            loss=_loss(facts["loss"]),
            control_loss=_loss(facts["control_loss"]),
            gain=_gain(facts["loss"], facts["control_loss"]),
            data=f"| data | {facts['data']} |\n" if "data" in facts else "",
            load=load,
        )
    )


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _gain(loss: float | None, control: float | None) -> str:
    return "not measured" if loss is None or control is None else f"{control - loss:+.4f}"
