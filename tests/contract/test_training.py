"""Training: the loss, the gradient of everything that was added, gradient checkpointing, the experts' balance."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.contract.conftest import B, Case, P, T
from tests.contract.reference import truth


def test_gradients_reach_everything_added(trained_case: Case, ids: Tensor) -> None:
    model = trained_case.build(diversify=("prefix", "embedding"))
    expected = truth(trained_case.plain, model, ids)
    loss = model(ids, labels=ids).loss
    by_hand = F.cross_entropy(expected.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss.double(), by_hand, rtol=0, atol=expected.tolerance)
    loss.backward()
    names = ("prefix_k", "prefix_v", "stream_embedding", "aggregate_layer")
    added = {name: p for name, p in model.named_parameters() if any(part in name for part in names)}
    assert len(added) == 2 * sum(hasattr(m, "prefix_k") for m in model.modules()) + 1 + 4
    for name, parameter in added.items():
        assert parameter.grad is not None, name
        grad = parameter.grad if "aggregate_layer" in name else parameter.grad.flatten(1).norm(dim=1)
        assert (grad.abs() > 0).all(), name  # of every stream


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen"])
def test_checkpointing_gives_identical_gradients(
    trained_case: Case, ids: Tensor, use_reentrant: bool, frozen: bool
) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = trained_case.build().train()
        if frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("prefix_" in name or "aggregate_layer" in name)
        if checkpointing:
            # Older transformers know the second name only, newer ones warn of it.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
        torch.manual_seed(5)  # dropout
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert list(found) == list(expected)
    assert any("prefix_k" in name for name in found)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_router_logits_and_auxiliary_loss(moe_case: Case, ids: Tensor) -> None:
    """The balance of the experts over the tokens of all streams, by the formula of the switch transformer."""
    expected = truth(moe_case.plain, moe_case.model, ids, output_router_logits=True)
    mask = torch.ones_like(ids)
    for inputs in ({}, {"attention_mask": mask}):
        output = moe_case.model(ids, labels=ids, output_router_logits=True, **inputs)
        layers = moe_case.plain.config.num_hidden_layers
        assert [r.shape for r in output.router_logits] == [(B * T, 4)] * (P * layers)
        aux = auxiliary_loss(torch.cat(expected.router_logits))
        torch.testing.assert_close(output.aux_loss.double(), aux, rtol=1e-5, atol=0)
        by_hand = F.cross_entropy(expected.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        with_aux = by_hand + moe_case.plain.config.router_aux_loss_coef * aux
        torch.testing.assert_close(output.loss.double(), with_aux, rtol=0, atol=expected.tolerance)


def auxiliary_loss(router_logits: Tensor, chosen: int = 2) -> Tensor:
    """experts · Σ_e (share of the choices that fall on e) · (mean probability of e), over (tokens, experts)."""
    probabilities = router_logits.double().softmax(-1)
    counts = F.one_hot(probabilities.topk(chosen).indices, probabilities.shape[1]).sum(1).double().mean(0)
    return probabilities.shape[1] * (counts * probabilities.mean(0)).sum()
