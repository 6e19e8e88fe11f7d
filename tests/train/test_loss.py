"""The chunked loss against the whole one in float64: values, gradients, and how large its tensors ever are."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from parscale.train import loss as loss_module
from parscale.train.loss import chunked_cross_entropy, chunked_loss
from tests.small import VOCABULARY, build, with_streams

N, D, V = 23, 12, 31


def _inputs(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    offset = [torch.randn(V, dtype=dtype)] if bias else []
    return [x.requires_grad_() for x in (hidden, weight, *offset)]


def _targets() -> torch.Tensor:
    targets = torch.randint(V, (N,))
    targets[::5] = -100
    return targets


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, N, 100])
def test_it_is_the_whole_loss(chunk: int, bias: bool) -> None:
    hidden, weight, *offset = _inputs(bias=bias)
    targets = _targets()
    b = offset[0] if bias else None
    expected = F.cross_entropy(F.linear(hidden, weight, b), targets, reduction="sum") / 17
    found = chunked_cross_entropy(hidden, weight, b, targets, 17, chunk)
    assert found.item() == pytest.approx(expected.item(), rel=1e-13)
    inputs = [hidden, weight, *offset]
    for ours, truth in zip(
        torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


def test_its_error_in_float32_is_that_of_the_whole_loss() -> None:
    exact, targets = [x.detach() for x in _inputs(bias=False)], _targets()
    truth = [x.clone().requires_grad_() for x in exact]
    reference = torch.autograd.grad(F.cross_entropy(truth[0] @ truth[1].T, targets, reduction="sum"), truth)

    def error(loss) -> float:
        inputs = [x.float().requires_grad_() for x in exact]
        grads = torch.autograd.grad(loss(*inputs), inputs)
        return max((g - r).abs().max().item() for g, r in zip(grads, reference, strict=True))

    naive = error(lambda h, w: F.cross_entropy(h @ w.T, targets, reduction="sum"))
    assert error(lambda h, w: chunked_cross_entropy(h, w, None, targets, 1, 7)) < 2 * naive + 1e-6


def test_it_works_in_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_SLICE", 8)
    hidden, weight, targets = *_inputs(bias=False, dtype=torch.float32), _targets()

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, [hidden, weight])

    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_cross_entropy(hidden, weight, None, targets, 17, 7)
        expected = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum") / 17
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    for ours, truth in zip(gradients(found), gradients(expected), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, truth, rtol=0.05, atol=0.02 * truth.abs().max().item())


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = _inputs(bias=False)
    weight.requires_grad_(False)
    chunked_cross_entropy(hidden, weight, None, _targets()).backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize(
    ("model_type", "changes", "chunked"),
    [
        ("qwen2", {"tie_word_embeddings": True}, True),
        ("llama", {"tie_word_embeddings": False}, True),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}, True),
        ("gemma2", {"query_pre_attn_scalar": 8}, False),  # its logits are capped
    ],
)
def test_a_model_learns_the_same(model_type: str, changes: dict, chunked: bool) -> None:
    plain = build(model_type, **changes).double()
    plain.config._experts_implementation = "eager"  # grouped products know no float64
    model = with_streams(plain, streams=2).train()
    ids = torch.randint(VOCABULARY, (3, 17))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
    batch = {"input_ids": ids, "labels": labels, "num_items_in_batch": 29}

    def whole() -> torch.Tensor:  # transformers' own takes the logits to float32
        output = model(input_ids=ids)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / 29
        return loss + model.config.router_aux_loss_coef * output.aux_loss if "aux_loss" in output else loss

    def gradients_of(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = whole()
    truth = gradients_of(expected)
    with chunked_loss(model) as active:
        assert active == chunked
        found = model(**batch).loss
        gradients = gradients_of(found)
        assert ("logits" in model(**batch)) != chunked
        assert model(input_ids=ids).logits.shape == (3, 17, VOCABULARY), "without labels the logits are asked for"
    exact = {"rtol": 1e-9, "atol": 1e-12} if chunked else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(found, expected, check_dtype=chunked, **exact)
    assert gradients.keys() == truth.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, truth[name], msg=name, **exact)
    assert "logits" in model(**batch), "the model is as it was"


def test_the_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 8 * 4096)
    model = with_streams(build(vocab_size=4096), streams=2).train()
    ids = torch.randint(4096, (4, 64))

    def largest() -> int:
        with _Largest() as seen:
            model(input_ids=ids, labels=ids).loss.backward()
        return seen.numel

    whole = 4 * 64 * 4096
    assert largest() >= whole
    with chunked_loss(model):
        assert largest() <= max(8 * 4096, model.lm_head.weight.numel())


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out
