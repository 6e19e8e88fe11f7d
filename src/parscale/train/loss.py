"""The training loss without its logits: the LM head and the cross-entropy over a few hundred tokens at a time.

The naive formula is `F.cross_entropy(hidden @ weight.T + bias, targets)`, whose (B·T, V) logits, their copies and their
gradient are most of the memory of a small model with a large vocabulary. Here each chunk's gradient is taken with its
loss, so that the logits of one chunk are all there ever is, and nothing is computed twice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LOGITS_AT_ONCE = 2**26
"""Elements of the logits that exist at a time: 256 MiB in float32, and half of that in bfloat16 beside it."""
IGNORED = -100
_SLICE = 8192  # rows of the LM head


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, divisor: Any = 1, chunk: int | None = None
) -> Tensor:
    """The sum over tokens of −log softmax(hidden·weightᵀ + bias)[target] in nats, divided by `divisor`.

    Args:
        hidden: (N, d), final hidden states.
        weight: (V, d) of the LM head.
        bias: (V,) or None.
        targets: (N,) token ids; those that are −100 do not count.
        divisor: how many tokens to take the mean over: a number or a 0-dimensional tensor.
        chunk: tokens at a time; by default as many as `LOGITS_AT_ONCE` allows.

    Returns:
        0-dimensional, float32 at least.
    """
    chunk = chunk or max(1, LOGITS_AT_ONCE // weight.shape[0])
    loss: Any = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, divisor, chunk, torch.is_grad_enabled())
    return loss


@contextmanager
def chunked_loss(model: Any) -> Iterator[bool]:
    """While it lasts, a causal LM that is given labels computes its loss in chunks and returns no logits.

    Yields whether it does: a model whose loss is not the plain one of its LM head (scaled or capped logits, a head that
    is quantised or carries a LoRA) goes on as it is. That is found by comparing the two on a few tokens.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft
    head, forward, before = model.get_output_embeddings(), model.forward, vars(model).get("forward")
    with_chunks = _with_chunks(model, head, forward)
    ordinary = type(head) is nn.Linear and "forward" not in vars(head)
    if not ordinary or not _is_plain(model, head, forward, with_chunks):
        yield False
        return
    model.forward = with_chunks
    try:
        yield True
    finally:
        vars(model).pop("forward", None)
        if before is not None:
            model.forward = before


def _with_chunks(model: Any, head: Any, forward: Any) -> Any:
    @wraps(forward)
    def with_chunks(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return forward(*args, **kwargs)
        items, targets = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
        if targets is None:
            targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        targets = targets.flatten()

        def loss_as_logits(hidden: Tensor) -> Tensor:
            divisor = (targets != IGNORED).sum() if items is None else items
            return chunked_cross_entropy(hidden.flatten(0, -2), head.weight, head.bias, targets, divisor)

        with _head_gives(model, head, loss_as_logits):
            output = forward(*args, labels=labels, **kwargs)
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})

    return with_chunks


@contextmanager
def _head_gives(model: Any, head: Any, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the LM head give the loss, and the loss function hand it on. It is computed in the head's own call, for there
    a head that is sharded has its whole weight."""
    loss_function = model.loss_function
    head.forward, model.loss_function = function, lambda logits, *_, **__: logits
    try:
        yield
    finally:
        del head.forward
        model.loss_function = loss_function


@torch.no_grad()
def _is_plain(model: Any, head: Any, forward: Any, with_chunks: Any) -> bool:
    """Whether the loss is the same, and whatever the head gives reaches it as it is, not scaled or capped."""
    ids = (torch.arange(16, device=model.device) * 7 % model.config.vocab_size)[None]
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    training = model.training
    model.eval()
    try:
        expected, found = (run(**batch).loss.float() for run in (forward, with_chunks))
        handed_on = []
        for value in (100.0, 200.0):  # a router's loss may be added to it
            with _head_gives(model, head, lambda hidden, value=value: hidden.new_tensor(value, dtype=torch.float32)):
                handed_on.append(forward(**batch).loss.item())
    except (IndexError, RuntimeError, TypeError):  # the model takes a slice of what should be logits
        return False
    finally:
        model.train(training)
    return abs(handed_on[1] - handed_on[0] - 100) < 1e-3 and torch.allclose(found, expected, rtol=1e-2, atol=0)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        divisor: Any,
        chunk: int,
        training: bool,
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        new = torch.empty_like if len(hidden) else torch.zeros_like  # the first chunk writes them
        grad_hidden, grad_weight, grad_bias = (
            new(x) if x is not None and needed and training else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        # One place for the logits of all chunks: on CPUs the first write to new memory takes as long as the arithmetic.
        place = hidden.new_empty(min(chunk, len(hidden)), len(weight), dtype=dtype)
        wide_place = place if dtype == wide else torch.empty_like(place, dtype=wide)
        with torch.autocast(device, enabled=False):
            table, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            for first in range(0, len(hidden), chunk):
                rows = slice(first, first + chunk)
                h = hidden[rows].to(dtype)
                logits, scores = place[: len(h)], wide_place[: len(h)]
                if offset is None:
                    torch.mm(h, table.T, out=logits)
                else:
                    torch.addmm(offset, h, table.T, out=logits)
                part, scale = _loss_of_chunk(scores.copy_(logits), targets[rows], divisor)
                loss += part
                if grad_bias is not None:
                    _add_product(grad_bias[:, None], scores, scale, anew=first == 0)
                logits.copy_(scores)
                if grad_hidden is not None:
                    grad_hidden[rows] = (logits @ table) * scale
                if grad_weight is not None:
                    _add_product(grad_weight, logits, (h * scale).to(dtype), anew=first == 0)
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), gradients, ctx.gradients = grads, ctx.gradients, None
        if grad.device.type != "cpu" or grad != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad)
        return *gradients, None, None, None, None


def _loss_of_chunk(scores: Tensor, targets: Tensor, divisor: Any) -> tuple[Tensor, Tensor]:
    """The chunk's loss. Its gradient by the logits is `scores` (n, V), which were the logits, times what is returned
    beside it (n, 1)."""
    counts, column = (targets != IGNORED)[:, None], targets.clamp(min=0)[:, None]
    picked, largest = scores.gather(1, column), scores.amax(1, keepdim=True)
    scores.sub_(largest).exp_()
    total = scores.sum(1, keepdim=True)
    loss = ((total.log() + largest - picked) * counts).sum() / divisor
    scores.scatter_add_(1, column, -total)  # softmax − one-hot, times its denominator
    return loss, counts / (total * divisor)


def _add_product(into: Tensor, scores: Tensor, h: Tensor, *, anew: bool) -> None:
    """into (V, d) += scoresᵀ (V, n) · h (n, d), or = where it is `anew`. In another dtype it is made in slices, to be
    cast and added."""
    if into.dtype == scores.dtype:
        into.addmm_(scores.T, h.to(into.dtype), beta=0 if anew else 1)
        return
    for first in range(0, len(into), _SLICE):
        rows = slice(first, first + _SLICE)
        product = scores[:, rows].T @ h.to(scores.dtype)
        if anew:
            into[rows] = product
        else:
            into[rows] += product
