"""Drawing by taking the highest: the frequencies are the softmax's, and a seed's draws are its own."""

import torch
from scipy import stats

from parscale.serve.prompt import samplings_of
from parscale.serve.sampling import Sampling, seed_of
from parscale.serve.schema import TextRequest

SCORES = torch.tensor([2.0, 1.5, 0.0, -1.0, 1.0, -3.0])
DRAWS = 2000


def draws(temperature: float, top_p: float = 1.0, seed: int = 0) -> torch.Tensor:
    sampling = Sampling(temperature, top_p, seed)
    return torch.stack([sampling.draw(SCORES, position).argmax() for position in range(DRAWS)])


def test_frequencies_are_those_of_the_softmax() -> None:
    for temperature in (0.5, 1.0, 2.0):
        counts = draws(temperature).bincount(minlength=6)
        expected = torch.softmax(SCORES.double() / temperature, 0) * DRAWS
        assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    chances = torch.softmax(SCORES.double(), 0)
    kept = {0, 1}  # 0.46 + 0.28 of the mass
    assert float(chances[0]) < 0.6 < float(chances[:2].sum())
    counts = draws(1.0, top_p=0.6).bincount(minlength=6)
    assert {i for i, count in enumerate(counts.tolist()) if count} == kept
    expected = chances[:2] / chances[:2].sum() * DRAWS
    assert stats.chisquare(counts[:2], expected).pvalue > 1e-3
    for tiny in (1e-6, 1e-46, 0.0):  # the second is 0 in float32
        assert set(draws(1.0, top_p=tiny).tolist()) == {0}
        assert int(Sampling(1.0, tiny, 0).draw(SCORES.flip(0), 0).argmax()) == 5


def test_seeds_and_positions_are_independent() -> None:
    first, second = draws(1.0, seed=1), draws(1.0, seed=2)
    assert torch.equal(first, draws(1.0, seed=1))
    table = torch.zeros(4, 4)
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        if a < 4 and b < 4:
            table[a, b] += 1
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack([first[1:], first[:-1]]).float())[0, 1])) < 4 * DRAWS**-0.5


def test_a_tiny_temperature_takes_the_highest() -> None:
    assert set(draws(1e-5).tolist()) == {0}


def test_no_choice_repeats_another_seeds_draws() -> None:
    """Seeds next to each other, with four choices each; also the seeds that Python's hash takes for the same."""
    seeds = [-2, -1, 0, 1, 2, 2**61 - 1, 2**61 - 2, -(2**63), 2**63 - 1]
    asked = [TextRequest(prompt="x", seed=seed) for seed in seeds]
    drawn = {
        tuple(int(sampling.draw(SCORES, position).argmax()) for position in range(60))
        for request in asked
        for sampling in samplings_of(request, 4)
        if sampling is not None
    }
    assert len(drawn) == 4 * len(seeds)


def test_the_first_choice_is_the_one_of_a_request_for_one() -> None:
    asked = TextRequest(prompt="x", seed=7)
    assert samplings_of(asked, 3)[0] == samplings_of(asked, 1)[0] == Sampling(1.0, 1.0, 7)


def test_the_generators_seeds_are_the_same_everywhere() -> None:
    assert [seed_of(7, 0, 5), seed_of(7, 1, 5), seed_of(-1, 0, 0), seed_of(-2, 0, 0)] == [
        3123347484,
        1948831856,
        2805764768,
        168329868,
    ]
