"""The probe against what each number means, computed the long way."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

import parscale
from parscale.probe import StreamProbe, probe_streams, unmerged

IDS = torch.arange(48).view(2, 24) % 37


def model(streams: int = 3, **changes: object):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        initializer_range=0.2,
    )
    settings = parscale.StreamsConfig(streams, 4, diversify=("prefix", "embedding"), **changes)  # type: ignore[arg-type]
    plain = AutoModelForCausalLM.from_config(config)
    parscale.parallelize(plain, settings)
    if streams > 1 and settings.has_head:
        torch.nn.init.normal_(plain.base_model.aggregate_layer[2].weight)
    return plain.eval()


@torch.no_grad()
def test_each_stream_alone_is_the_model_with_all_weight_on_it() -> None:
    m = model()
    seen = probe_streams(m, IDS)
    assert seen.loss == pytest.approx(m(input_ids=IDS, labels=IDS).loss.item(), abs=1e-5)
    for stream, loss in enumerate(seen.stream_losses):
        one_hot = torch.zeros(3, 2, 24).index_fill_(0, torch.tensor(stream), 1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("parscale.streams.backbone.stream_weights", lambda *_, weights=one_hot: weights)
            assert m(input_ids=IDS, labels=IDS).loss.item() == pytest.approx(loss, abs=1e-5)


@torch.no_grad()
def test_cosine_is_the_mean_over_pairs_and_tokens() -> None:
    m = model()
    with unmerged(m):
        hidden = m.model(input_ids=IDS).last_hidden_state.view(3, 2, 24, 32)
    pairs = [F.cosine_similarity(hidden[i], hidden[j], dim=-1).mean() for i in range(3) for j in range(i)]
    seen = probe_streams(m, IDS)
    assert seen.cosine == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
    assert seen.layer_cosine[-1] == pytest.approx(seen.cosine)
    assert len(seen.layer_cosine) == 2


def test_weights_sum_to_one_and_equal_weights_are_p_effective_streams() -> None:
    seen = probe_streams(model(), IDS)
    assert sum(seen.weights) == pytest.approx(1)
    assert 1 <= seen.effective_streams < 3
    assert probe_streams(model(aggregate="mean"), IDS).effective_streams == pytest.approx(3)


@torch.no_grad()
def test_error_correlation_is_pearson_over_tokens_against_the_control() -> None:
    m, control = model(2), model(1)
    with unmerged(m):
        logits = m(input_ids=IDS).logits.view(2, 2, 24, 64)
    reference = control(input_ids=IDS).logits

    def losses(x: torch.Tensor) -> torch.Tensor:
        return -x.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None]).flatten()

    errors = torch.stack([losses(one) - losses(reference) for one in logits])
    expected = torch.corrcoef(errors)[0, 1].item()
    assert probe_streams(m, IDS, control=control).error_correlation == pytest.approx(expected, abs=1e-4)


def test_soft_capped_logits_are_the_models_own() -> None:
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
        final_logit_softcapping=0.5,
        attn_implementation="eager",
    )
    m = parscale.parallelize(AutoModelForCausalLM.from_config(config), parscale.StreamsConfig(2, 4)).eval()
    assert all(abs(loss - math.log(64)) < 1.0 for loss in probe_streams(m, IDS).stream_losses)


def test_probing_leaves_the_model_as_it_was() -> None:
    m = model().train()
    before = m(input_ids=IDS).logits
    probe_streams(m, IDS)
    assert m.training
    assert torch.equal(m(input_ids=IDS).logits, before)


def test_verdicts() -> None:
    def seen(
        cosine: float | None, weights: list[float], losses: list[float], loss: float, smoothing: float = 0.0
    ) -> StreamProbe:
        return StreamProbe(len(weights), 10, loss, losses, weights, smoothing, 1.0, cosine, [], None)

    fine = seen(0.8, [0.4, 0.6], [3.0, 3.1], 2.9)
    assert (fine.collapsed, fine.monoculture) == (False, False)
    assert "differ" in fine.verdict
    assert "collapse" in seen(0.999, [0.5, 0.5], [3.0, 3.1], 2.9).verdict
    assert "no better than the best" in seen(0.8, [0.5, 0.5], [3.0, 3.1], 3.0).verdict
    assert "monoculture" in seen(0.8, [0.02, 0.98], [3.0, 3.1], 2.9).verdict
    assert "monoculture" in seen(0.8, [0.15, 0.85], [3.0, 3.1], 2.9, 0.3).verdict, "all that the head can give"
    assert "monoculture" not in seen(0.8, [0.5, 0.5], [3.0, 3.1], 2.9, 1.0).verdict
    assert "one stream" in seen(None, [1.0], [3.0], 3.0).verdict


def test_a_model_without_streams_is_refused() -> None:
    plain = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(parscale.InputError, match="has no streams"):
        probe_streams(plain, IDS)
    with pytest.raises(parscale.InputError, match="length >= 2"):
        probe_streams(model(), IDS[:, :1])
