"""Documents that share a block and do not see each other: positions start anew, and with them transformers' mask.

Given positions that restart and no other mask, transformers lets no token attend over a restart. The prefix stands in
front of every query, so each document has it as if it ran alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import default_data_collator

from parscale.errors import InputError
from parscale.streams.diversify.calibration import evaluating
from parscale.train.data import PackedText

Collator = Callable[[list[Any]], dict[str, Any]]


def collator(text: PackedText) -> Collator | None:
    """What makes batches of a text's blocks: `input_ids`, `labels` and, for separate documents, `position_ids`.

    None for examples of unequal length, which TRL pads itself.
    """
    if "completion_mask" in text.train.column_names:
        return None
    if text.end_of_text is None:
        return default_data_collator
    return SeparateDocuments(text.end_of_text)


class SeparateDocuments:
    """Batches of packed blocks whose documents each end in `end_of_text`."""

    def __init__(self, end_of_text: int) -> None:
        self.end_of_text = end_of_text

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Rows of `input_ids` and `labels` (T,) → a batch (B, T) of them and of `position_ids`.

        The first token of a document is no label: what stands before it is another document's end.
        """
        batch = default_data_collator(rows)
        starts = document_starts(batch["input_ids"], self.end_of_text)
        index = torch.arange(starts.shape[1]).expand_as(starts)
        batch["position_ids"] = index - torch.where(starts, index, 0).cummax(dim=1).values
        batch["labels"] = batch["labels"].masked_fill(starts, -100)
        return batch


def check_separate(model: Any, end_of_text: int) -> None:
    """Refuse a model in which a document sees the one before it, however its positions start.

    Raises:
        InputError: names the family. Its attention takes no mask from positions, or it has a recurrent state.
    """
    one, other = (token for token in range(3) if token != end_of_text) if end_of_text < 3 else (0, 1)
    second = [end_of_text, one, other, one]
    ids = torch.tensor([[one, one, one, *second], [other, other, other, *second]], device=model.device)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2], device=model.device).expand_as(ids)
    with evaluating(model), torch.no_grad():
        told = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:].float()
    if not torch.allclose(told[0], told[1], rtol=1e-2, atol=1e-2 * told.std().item()):
        raise InputError(
            f"separate_documents with a model of the family {model.config.model_type!r}: its documents see each other "
            "all the same; leave it out, or take another model"
        )


def document_starts(input_ids: Tensor, end_of_text: int) -> Tensor:
    """(B, T) bool: the first token of a block, and each that follows an end-of-text token."""
    starts = torch.ones_like(input_ids, dtype=torch.bool)
    starts[:, 1:] = input_ids[:, :-1] == end_of_text
    return starts
