"""The fit against known laws: the paper's optimum, laws that made the data, gradients in float64."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import check_grad

from parscale.errors import InputError
from parscale.law.compare import compare
from parscale.law.equivalence import equivalence_exponent, equivalent_params
from parscale.law.fit import Law, bootstrap, bootstrap_thetas, fit, huber_of_log_loss, law_of, leave_one_out
from parscale.law.forms import FORMS
from parscale.law.report import predictions
from parscale.law.runs import Runs, paper, read_runs

SIZES, STREAMS, TOKENS = (3e8, 6e8, 1e9, 2e9, 4e9), (1, 2, 4, 8), (1e10, 3e10, 1e11)


@pytest.fixture(scope="module")
def stack() -> Law:
    return fit(paper("stack"))


def test_the_papers_optimum_on_stack(stack: Law) -> None:
    assert stack.coefficients == pytest.approx({"E": 0.6912, "A": 0.01131, "alpha": 0.1894, "k": 0.3935}, rel=1e-3)
    assert stack.r2 >= 0.9978
    assert stack.objective <= 3.6768e-05


def test_the_papers_optimum_on_pile_in_under_five_seconds_of_one_core() -> None:
    began = time.process_time()
    law = fit(paper("pile"))
    assert (
        time.process_time() - began < 5
    )  # the promise is about work, so it is CPU time: a busy machine cannot fail it
    assert law.coefficients == pytest.approx({"E": 1.2886, "A": 0.1975, "alpha": 0.1963, "k": 0.3344}, rel=1e-3)
    assert law.r2 >= 0.9986
    assert law.objective <= 1.8140e-05


@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_the_curves_own(name: str) -> None:
    form = FORMS[name]
    runs = _runs(lambda n, p, d: 1 + 0.3 * n**-0.2, all_tokens=True)
    rng = np.random.default_rng(0)
    for _ in range(5):
        theta = np.array([0.6, -2.0, 0.3, 0.4, 0.3, 0.3][: len(form.coefficients)]) * rng.uniform(0.5, 1.5)

        def value(t: np.ndarray) -> float:
            return huber_of_log_loss(t, runs, form)[0]

        def gradient(t: np.ndarray) -> np.ndarray:
            return huber_of_log_loss(t, runs, form)[1]

        assert check_grad(value, gradient, theta) < 1e-5 * max(1e-3, float(np.abs(gradient(theta)).max())) * 100


def test_the_objective_is_the_sum_of_huber_terms(stack: Law) -> None:
    """Written out for one coefficient vector, run by run."""
    theta, runs = np.array([0.7, np.log(0.012), 0.2, 0.4]), stack.runs
    total = 0.0
    for n, p, measured in zip(runs.params, runs.streams, runs.loss):
        predicted = 0.7 + (0.012 * 1e9 / (n * (0.4 * np.log(p) + 1))) ** 0.2
        error = abs(np.log(predicted) - np.log(measured))
        total += error**2 / 2 if error <= 0.001 else 0.001 * (error - 0.0005)
    assert huber_of_log_loss(theta, runs, stack.form)[0] == pytest.approx(total, rel=1e-12)


TRUTHS = {
    "paper": lambda n, p, d: 0.7 + (0.02 / (n * (1 + 0.4 * np.log(p)))) ** 0.25,
    "outside": lambda n, p, d: 0.7 + (0.02 / n) ** 0.25 / (1 + 0.1 * np.log(p)),
    "power": lambda n, p, d: 0.7 + (0.02 / (n * p**0.3)) ** 0.25,
    "saturating": lambda n, p, d: 0.7 + (0.02 / n) ** 0.25 * (0.8 + 0.2 / p),
    "growing": lambda n, p, d: 0.7 + (0.02 / (n * (1 + 0.4 * n**0.3 * np.log(p)))) ** 0.25,
}


@pytest.mark.parametrize("name", TRUTHS)
def test_cross_validation_finds_the_form_that_made_the_data(name: str) -> None:
    comparison = compare(_runs(TRUTHS[name]))
    best = comparison.rivals[0].law
    simplest = min(comparison.supported, key=lambda form: len(FORMS[form].coefficients))
    assert simplest == name, comparison.verdict
    assert best.r2 > 0.99999


def test_a_data_term_is_recovered() -> None:
    runs = _runs(lambda n, p, d: TRUTHS["paper"](n, p, d) + (0.5 / (d / 1e9)) ** 0.3, all_tokens=True)
    law = fit(runs, "data")
    truth = {"E": 0.7, "A": 0.02, "alpha": 0.25, "k": 0.4, "B": 0.5, "beta": 0.3}
    assert law.coefficients == pytest.approx(truth, rel=0.02)
    assert law.predict(1e9, 2, 3e10) < law.predict(1e9, 2, 1e10)
    with pytest.raises(InputError, match="tokens is missing"):
        law.predict(1e9, 2)


def test_no_streams_in_the_data_are_no_use_of_streams_in_the_law() -> None:
    """A law without P in it: k comes out at its lower bound, and a rival form without P is as good."""
    law = fit(_runs(lambda n, p, d: 0.7 + (0.02 / n) ** 0.25))
    assert law.k < 1e-4
    assert "chinchilla" in compare(law.runs).supported


def test_intervals_hold_the_fit_and_grow_with_noise(stack: Law) -> None:
    intervals = bootstrap(stack, samples=60)
    for name, value in stack.coefficients.items():
        low, high = intervals[name]
        assert low < value < high
    assert 0.32 < intervals["k"][0] < 0.37
    assert 0.41 < intervals["k"][1] < 0.47
    assert bootstrap(stack, samples=60) == intervals  # one seed, one answer
    exact = bootstrap(fit(_runs(TRUTHS["paper"])), samples=40)
    assert exact["k"][1] - exact["k"][0] < 1e-3


def test_leaving_sizes_out_predicts_them(stack: Law) -> None:
    rows = leave_one_out(stack, stack.runs.size)
    assert [round(row["params"] / 1e6) for row in rows] == [536, 694, 1088, 1571, 2775, 4353]
    kept = stack.runs.take(stack.runs.size != 5)
    again = fit(kept)  # all 300 starts, where leave_one_out starts from the full fit
    assert rows[5]["coefficients"] == pytest.approx(again.coefficients, rel=1e-3)
    assert np.abs(rows[5]["errors"]).max() < 0.012


def test_predictions_have_the_shape_asked_for(stack: Law) -> None:
    by_hand = stack.E + (stack.A * 1e9 / (1.6e9 * (stack.k * np.log(8) + 1))) ** stack.alpha
    assert stack.predict(1.6e9, 8) == pytest.approx(by_hand, rel=1e-12)
    grid = stack.predict(np.array([1e9, 2e9])[:, None], np.array([1, 2, 4]))
    assert grid.shape == (2, 3)
    assert grid[1, 2] == pytest.approx(stack.predict(2e9, 4))
    with pytest.raises(InputError, match="params"):
        stack.predict(-1, 2)


def test_streams_are_worth_the_parameters_of_the_same_loss(stack: Law) -> None:
    dense = equivalent_params(stack, 1.6e9, 8)
    assert dense == pytest.approx(1.6e9 * (stack.k * np.log(8) + 1), rel=1e-9)
    assert stack.predict(dense, 1) == pytest.approx(stack.predict(1.6e9, 8), rel=1e-12)
    assert equivalence_exponent(stack, 1.6e9, 8) == pytest.approx(np.log(dense / 1.6e9) / np.log(8))
    power = fit(_runs(TRUTHS["power"]), "power")
    assert equivalence_exponent(power, 1e9, 4) == pytest.approx(0.3, rel=1e-3)
    with pytest.raises(InputError, match="streams"):
        equivalence_exponent(stack, 1.6e9, 1)


def test_a_run_is_left_out_with_all_its_seeds() -> None:
    """The same losses under four seeds are no more evidence than under one."""
    rows = paper("pile")
    twice = [row | {"seed": seed} for row in rows for seed in (0, 1)]
    for ours, theirs in zip(compare(twice).rivals, compare(rows).rivals, strict=True):
        assert ours.law.form.name == theirs.law.form.name
        assert ours.by_run == pytest.approx(theirs.by_run, rel=2e-2)
    assert bootstrap(fit(twice), samples=40)["k"] == pytest.approx(bootstrap(fit(rows), samples=40)["k"], rel=2e-2)


def test_as_many_runs_as_coefficients_tell_no_errors() -> None:
    four = [row for row in paper("stack") if row["streams"] in (1, 8)]
    four = four[:2] + four[-2:]
    law = fit(four)
    assert all(np.isnan(low) and np.isnan(high) for low, high in bootstrap(law, samples=40).values())
    with pytest.raises(InputError, match="4 distinct runs leave nothing"):
        bootstrap_thetas(law, 40)
    twice = compare([row | {"seed": seed} for row in four for seed in (0, 1)])
    assert [rival.law.form.name for rival in twice.rivals] == ["chinchilla"]
    assert twice.verdict == "Too few runs to compare forms of law."


def test_tokens_that_differ_are_not_pooled(tmp_path: Path) -> None:
    rows = [
        f"{row['params']},{row['streams']},{row['loss'] + (0.5e9 / d) ** 0.3},{d}"
        for row in paper("stack")
        for d in (1e9, 2e9, 4e9)
    ]
    path = tmp_path / "runs.csv"
    path.write_text("params, streams, loss, tokens\n" + "\n".join(rows), encoding="utf-8-sig")
    with pytest.raises(InputError, match="the form 'paper' has no term: fit the form 'data'"):
        law_of(path, "paper")
    law = law_of(path)
    assert law.form.name == "data"
    told = predictions(law, [1e9], [1, 8, 16], 1e9)
    assert [row["extrapolated"] for row in told] == [False, False, True]
    assert predictions(law, [1e9], [8], 1e12)[0]["extrapolated"]


@pytest.mark.parametrize(
    ("rows", "form", "said"),
    [
        ([r for r in paper("stack") if r["streams"] == 1], "paper", "all runs have streams=1: k is not identifiable"),
        (paper("stack")[:1] + paper("stack")[6:8], "paper", "3 distinct runs cannot determine the 4 coefficients"),
        ([r for r in paper("stack") if r["params"] < 5.5e8], "paper", "one size"),
        (paper("stack"), "data", "tokens column"),
        (paper("stack"), "linear", "choose one of paper, outside"),
    ],
)
def test_runs_that_cannot_determine_the_form_are_refused(rows: list[dict], form: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        fit(rows, form)
    assert "\n" not in str(caught.value)


def test_one_p_can_be_fitted_without_p() -> None:
    law = fit([r for r in paper("stack") if r["streams"] == 1], "chinchilla")
    assert law.r2 > 0.99
    with pytest.raises(InputError, match="no k"):
        _ = law.k


@pytest.mark.slow
def test_the_scouted_starts_find_the_optimum_of_all_300(stack: Law) -> None:
    from parscale.law.fit import _descend

    every = (np.array(start) for start in itertools.product(*stack.form.starts))
    best = min(_descend(stack.runs, stack.form, start, 5000)[0] for start in every)
    assert stack.objective == pytest.approx(best, rel=1e-9)


def _runs(truth, all_tokens: bool = False) -> Runs:
    tokens = TOKENS if all_tokens else TOKENS[:1]
    rows = [
        {"params": n, "streams": p, "tokens": d, "loss": truth(n / 1e9, p, d)}
        for n, p, d in itertools.product(SIZES, STREAMS, tokens)
    ]
    return read_runs(rows)
