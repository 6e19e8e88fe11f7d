"""Verdicts on rows whose answer is known."""

import itertools
import math
import statistics
from typing import Any

import numpy as np
import pytest

from parscale.errors import InputError
from parscale.experiments.catalogue import CLAIMS, claim_named
from parscale.experiments.claims import efficiency, law, theory
from parscale.experiments.experiment import judged, outcome_told, verdict_of
from parscale.experiments.runs import SCALES
from parscale.experiments.verdicts import Outcome, Verdict, combine, gain_of, interval, paired
from parscale.law.compare import Comparison
from tests.experiments.rows import row, seeds

CONTROL = (3.0, 3.1, 3.2)
SMALLEST = SCALES["cpu"].sizes[0]


def keys(rows: list[dict[str, Any]]) -> set[tuple[str, int]]:
    return {(row["name"], row["seed"]) for row in rows}


def verdict(name: str, rows: list[dict[str, Any]]) -> Any:
    """Of rows with the names that the claim has at the scale cpu."""
    return CLAIMS[name].verdict(judged(CLAIMS[name], rows, "cpu"))


def test_a_gain_is_paired_by_seed_and_told_in_deviations_of_the_reference() -> None:
    rows = [row("control", s, loss) for s, loss in ((2, 3.2), (0, 3.0), (1, 3.1))]
    rows += [row("P=4", s, loss) for s, loss in ((0, 2.9), (1, 2.8), (2, 3.0), (3, 9.0))]
    gain = paired(rows, "P=4", "control")
    assert gain.mean == pytest.approx((0.1 + 0.3 + 0.2) / 3)
    assert gain.deviations == pytest.approx(gain.mean / statistics.stdev([3.0, 3.1, 3.2]))
    assert gain.seeds == 3


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(0).normal(size=(2000, 3))
    held = [low < 0 < high for low, high in map(interval, drawn.tolist())]
    assert statistics.mean(held) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ((2.9, 3.0, 3.1), "supported"),
        ((3.1, 3.2, 3.3), "not supported"),
        (CONTROL, "not supported"),
        ((2.997, 3.101, 3.196), "not supported"),  # at most 0.011 nats
        ((2.9, 3.2, 3.2), "undecided"),
        ((2.9, 3.0), "undecided"),
        ((2.9,), "undecided"),
        ((), "not run"),
    ],
)
def test_three_seeds_on_one_side_decide(values: tuple[float, ...], outcome: Outcome) -> None:
    assert gain_of(values, CONTROL[: len(values)]).outcome == outcome


def test_parts_that_disagree_leave_a_claim_undecided() -> None:
    assert combine(["supported", "not run", "supported"]) == "supported"
    assert combine(["supported", "not supported"]) == "undecided"
    assert combine(["not run"]) == combine([]) == "not run"
    told = Verdict(["undecided", "supported", "not run", "supported"], "")
    assert (told.outcome, told.told_parts) == ("undecided", "2 supported, 1 undecided")
    assert outcome_told(told, "cpu") == "undecided (2 supported, 1 undecided)"
    assert outcome_told(Verdict(["supported", "supported"], ""), "cpu") == "supported"


@pytest.mark.parametrize(("losses", "outcome"), [((2.9, 3.0, 3.1), "supported"), ((3.1, 3.2, 3.3), "not supported")])
def test_baseline(losses: tuple[float, ...], outcome: str) -> None:
    rows = seeds("control", *CONTROL) + seeds("P=1, no prefix", *CONTROL) + seeds("P=4, prefix", *losses)
    found = verdict("baseline", rows)
    assert found.outcome == outcome
    assert found.curves == {"code, prefix": [(4.0, pytest.approx(3.1 - statistics.mean(losses)))]}
    assert [line["run"] for line in found.table] == ["control", "P=1, no prefix", "P=4, prefix"]


def test_texts_are_judged_apart() -> None:
    rows = seeds("control", *CONTROL) + seeds("P=2, prefix", 2.9, 3.0, 3.1)
    other = seeds("control", 1.0, 1.1, 1.2, corpus="law") + seeds("P=2, prefix", 1.1, 1.2, 1.3, corpus="law")
    assert verdict("baseline", rows + other).outcome == "undecided"


def test_texts_of_one_name_are_not_compared() -> None:
    """The standard library is another text on another Python."""
    ours = seeds("control", *CONTROL, fingerprint="094f4714aa")
    theirs = seeds("P=2, prefix", 2.9, 3.0, 3.1, fingerprint="776e4399bb")
    told = verdict_of(CLAIMS["baseline"], [*ours, *theirs], "cpu")
    assert told.outcome != "supported"
    assert {line["text"] for line in told.table} == {"code (094f4714)", "code (776e4399)"}
    same = [line | {"fingerprint": "094f4714aa"} for line in theirs]
    assert verdict_of(CLAIMS["baseline"], ours + same, "cpu").table[0]["text"] == "code"


def test_aggregation() -> None:
    measured = {"merged": 2.0, "uniform": 2.2, "probabilities": 2.1, "alone": [2.5, 2.3], "weights": [0.6, 0.4]}
    rows = seeds("P=4, prefix, learned", 2.9, 3.0, 3.1, measured=measured)
    found = verdict("aggregation", rows + seeds("P=4, prefix, mean", *CONTROL, measured=measured))
    assert found.outcome == "supported"
    assert found.table[0]["best stream alone"] == 2.3


def smoothed(epsilon: float, weight: float, *losses: float) -> list[dict[str, Any]]:
    of: Any = {"streams": 2, "run": {"streams": {"streams": 2, "smoothing": epsilon}}}
    return seeds(f"P=2, ε={epsilon:g}", *losses, measured={"weights": [weight, 1 - weight]}, **of)


def test_smoothing() -> None:
    found = verdict("smoothing", smoothed(0, 0.95, *CONTROL) + smoothed(0.1, 0.6, 2.9, 3.0, 3.1))
    assert found.outcome == "supported"
    assert [line["monoculture"] for line in found.table] == ["3 of 3", "0 of 3"]
    assert found.curves["code, P=2"] == [(0.0, pytest.approx(0.95)), (0.1, pytest.approx(0.55 / 0.9))]
    assert "no monoculture from ε = 0.1 on" in found.reason


def test_smoothing_has_to_keep_the_weights_even_too() -> None:
    rows = smoothed(0, 0.6, *CONTROL) + smoothed(0.1, 0.95, 2.9, 3.0, 3.1)
    assert verdict("smoothing", rows).outcome == "not supported"


def test_what_smoothing_gives_to_all_is_no_balance_of_the_head() -> None:
    """A head that gives one of two streams all has 0.9 of the weight left to it at an ε of 0.2."""
    found = verdict("smoothing", smoothed(0, 1.0, *CONTROL) + smoothed(0.2, 0.9, *CONTROL))
    assert [line["monoculture"] for line in found.table] == ["3 of 3", "3 of 3"]
    assert found.table[1]["largest that the head gives"] == pytest.approx(1.0)
    assert verdict("smoothing", smoothed(0, 1.0, *CONTROL)).reason.count("no ε that was run") == 1


def test_dynamic_adds_what_fewer_streams_lose_to_the_loss_of_all() -> None:
    measured = {"merged": 2.5, "at": {"1": 3.5, "2": 2.9, "4": 2.5}}
    rows = seeds("control", *CONTROL)
    for name in ("trained at P=4", "trained at random p"):
        rows += seeds(name, 2.5, 2.6, 2.7, measured=measured)
    rows += seeds("control, adapter", *CONTROL) + seeds("adapter P=2", 2.8, 2.9, 3.0)
    found = verdict("dynamic", rows)
    assert found.outcome == "supported"  # 2.5 + 0.4 = 2.9 against 3.0
    assert found.table[0]["p=2"] == pytest.approx(3.0)
    assert found.table[0]["p=1"] == pytest.approx(3.6)
    assert found.table[0]["gain at p=2"].startswith("+0.1000")
    assert "adapter P=2 over one stream's on the same frozen backbone, on code: +0.2" in found.reason
    worse = [r | {"validation_loss": r["validation_loss"] + 1 * (r["name"] == "trained at P=4")} for r in rows]
    assert verdict("dynamic", worse).outcome == "supported", "it was not trained for fewer streams"
    slow = seeds("trained at random p, slow head", 2.7, 2.8, 2.9, measured=measured)
    assert verdict("dynamic", rows + slow).outcome == "not supported", "the slow head, which all have, decides"
    without = [row for row in rows if row["name"] != "control"]
    assert verdict("dynamic", without).outcome == "not run", "a sweep under way may lack the control yet"


@pytest.mark.parametrize(("sign", "outcome"), [(1, "supported"), (-1, "not supported")])
def test_theory(sign: int, outcome: str) -> None:
    """Gains that rise, or fall, with what the theory predicts."""
    rows = seeds("control", *CONTROL)
    for i, rho in enumerate((0.1, 0.3, 0.5, 0.7)):
        gain = sign * 0.1 * (1 - rho)
        rows += seeds(f"P=4, {i}", *(loss - gain for loss in CONTROL), streams=4, measured={"rho": rho})
    found = theory.verdict(rows)
    assert found.outcome == outcome
    assert found.table[0]["[(P−1)ρ+1]/P"] == pytest.approx((3 * 0.1 + 1) / 4)
    assert found.table[0]["reducible loss that this would take"] == pytest.approx(sign * 0.09 / (1 - 1.3 / 4))


def test_the_seeds_of_a_run_are_no_runs_of_their_own() -> None:
    """Copies of a point tell nothing new: the interval is that of the points alone."""
    points = np.random.default_rng(0).normal(size=(6, 2))
    alone = theory._rank_correlation(list(points[:, None]))
    copied = theory._rank_correlation(list(points[:, None].repeat(3, axis=1)))
    assert copied == pytest.approx(alone)


def test_theory_is_not_decided_by_one_seed() -> None:
    rows = seeds("control", 3.0)
    for i in range(8):
        rows += seeds(f"P=4, {i}", 2.9 + 0.01 * i, streams=4, measured={"rho": 0.1 * i})
    found = theory.verdict(rows)
    assert (found.outcome, "fewer than 3 seeds" in found.reason) == ("undecided", True)


def test_theory_says_nothing_of_a_few_runs() -> None:
    streamed = [row for p in (2, 4) for row in seeds(f"P={p}", 3.0, 2.9, streams=p, measured={"rho": 0.1 * p})]
    rows = seeds("control", *CONTROL) + streamed
    two_texts = rows + [row | {"corpus": "prose"} for row in rows]
    assert theory.verdict(two_texts).outcome == "undecided"  # eight in all, but four on each text


def test_prefix() -> None:
    bands = [[0.4, 0.4], [0.3, 0.3], [0.1, 0.2]]
    measured = {"prefix_attention_by_position": bands, "rho_by_position": [0.9, 0.8], "gain_by_position": [0.1, 0.3]}
    rows = seeds("control, n=48", *CONTROL) + seeds("n=48", 2.9, 3.0, 3.1, measured=measured)
    found = verdict("prefix", rows)
    even = [statistics.mean(48 / (49 + t) for t in places) for places in (range(32), range(64, 96))]
    assert found.table[0]["over n/(n+t), first eighth"] == pytest.approx(0.4 / even[0])
    assert found.table[0]["over n/(n+t), last eighth"] == pytest.approx(0.15 / even[1])
    assert (found.table[0]["gain, first eighth"], found.table[0]["gain, last eighth"]) == (0.1, 0.3)
    assert found.outcome == "supported"
    held = measured | {"prefix_attention_by_position": [[0.4, 0.4], [0.3, 0.3], [0.3, 0.3]]}
    rows = seeds("control, n=48", *CONTROL) + seeds("n=48", 2.9, 3.0, 3.1, measured=held)
    assert verdict("prefix", rows).outcome == "not supported", "what is lost is what every other key loses"
    assert (found.table[0]["attention on it, first eighth"], found.table[0]["last eighth"]) == (
        0.4,
        pytest.approx(0.15),
    )


def law_rows(k: float, seeds: int = 3) -> list[dict[str, Any]]:
    """Losses of a known law at the paper's sizes, with noise of 0.0005 nats."""
    noise, rows = np.random.default_rng(0), []
    sizes = dict(zip(SCALES["cpu"].sizes, (0.5e9, 0.7e9, 1.1e9, 1.6e9, 2.8e9), strict=True))
    for (size, n), p, seed in itertools.product(sizes.items(), (1, 2, 4, 8), range(seeds)):
        loss = 0.7 + (0.0113e9 / (n * (k * math.log(p) + 1))) ** 0.19 + noise.normal(scale=5e-4)
        own = 0.4 * n * p  # says nothing
        rows.append(row(f"{size}, P={p}", seed, loss, params=n + own, stream_parameters=own, streams=p))
    return rows


@pytest.mark.slow
def test_a_known_law_is_found_again() -> None:
    found = verdict("law", law_rows(0.4))
    assert found.outcome == "supported"
    k = float(found.reason.split("k = ")[1].split()[0])
    assert k == pytest.approx(0.4, abs=0.05)


@pytest.mark.slow
def test_streams_without_effect_are_no_law() -> None:
    """k cannot be below its bound, which is above 0."""
    assert verdict("law", law_rows(0.0)).outcome == "not supported"


@pytest.mark.parametrize(
    ("low", "supported", "outcome"),
    [
        (0.1, ["paper"], "supported"),
        (0.1, ["power"], "not supported"),
        (0.1, ["paper", "chinchilla"], "not supported"),
        (1e-8, ["power", "chinchilla"], "not supported"),
        (1e-8, ["paper", "power"], "undecided"),
    ],
)
def test_an_interval_down_to_the_bound_is_not_a_refutation(
    low: float, supported: list[str], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(law, "bootstrap", lambda fitted, draws: {"k": (low, 0.5)})
    monkeypatch.setattr(law, "compare", lambda runs: Comparison([], supported, "."))
    assert verdict("law", law_rows(0.4)).outcome == outcome


def test_runs_with_a_load_balance_have_a_law_of_their_own_that_decides_nothing() -> None:
    """Two streams have no remedy: they stand in both."""
    rows = law_rows(0.2)
    even = [r | {"name": f"{r['name']}, load balance"} for r in law_rows(0.6) if r["streams"] >= 4]
    kinds = law.by_remedy(judged(law.CLAIM, rows + even, "cpu"))
    assert keys(kinds[""]) == keys(rows)
    assert keys(kinds["load balance"]) == keys([r for r in rows if r["streams"] < 4] + even)
    of_one_size = judged(law.CLAIM, rows + [r for r in even if r["name"].startswith(f"{SMALLEST},")], "cpu")
    assert {r["of"].model for r in law.by_remedy(of_one_size)["load balance"]} == {SMALLEST}


def test_a_rate_by_width_has_the_scales_own_width_as_it_is() -> None:
    rows = law_rows(0.2)
    by_width = [r | {"name": f"{r['name']}, rate by width"} for r in law_rows(0.6) if r["name"].startswith(SMALLEST)]
    kinds = law.by_remedy(judged(law.CLAIM, rows + by_width, "cpu"))
    assert keys(kinds[""]) == keys(rows)
    found = kinds["rate by width"]
    assert {r["of"].model for r in found} == {"pico", SMALLEST}
    assert all(r["of"].variant == "rate by width" for r in found if r["of"].model == SMALLEST)


@pytest.mark.slow
def test_a_load_balance_is_told_beside_the_law() -> None:
    even = [r | {"name": f"{r['name']}, load balance"} for r in law_rows(0.6, seeds=1) if r["streams"] >= 4]
    found = verdict("law", law_rows(0.4) + even)
    assert found.outcome == verdict("law", law_rows(0.4)).outcome
    ours, theirs = (float(part.split()[0]) for part in found.reason.split("k = ")[1::2])
    assert found.reason.count("code, load balance: k = ") == 1
    assert theirs > ours


def test_a_law_of_one_size_cannot_be_fitted() -> None:
    rows = [r for r in law_rows(0.4, seeds=1) if r["name"].startswith(f"{SMALLEST},")]
    assert verdict("law", rows).outcome == "undecided"


def test_many_streams_judges_the_doublings_beyond_eight() -> None:
    rows = seeds("control", *CONTROL)
    for p, gain in ((8, 0.3), (16, 0.2), (32, 0.1)):
        rows += seeds(f"P={p}", *(loss - gain for loss in CONTROL))
    assert verdict("many-streams", rows).outcome == "not supported"
    rows = seeds("P=2", *CONTROL) + seeds("P=4", 2.9, 3.0, 3.1) + seeds("P=8", 2.87, 2.97, 3.07)
    assert "the last less the first on code: -0.07" in verdict("many-streams", rows).reason


def test_data_compares_the_gains_at_least_and_most_tokens() -> None:
    rows = []
    for factor, gain in ((0.25, 0.05), (0.5, 0.1), (1, 0.2)):
        rows += seeds(f"control, {factor:g} × tokens", *CONTROL)
        rows += seeds(f"P=2, {factor:g} × tokens", *(loss - gain for loss in CONTROL))
    found = verdict("data", rows)
    assert found.outcome == "supported"
    assert [x for x, _ in found.curves["code, P=2"]] == [-2.0, -1.0, 0.0]
    of_equal_compute = [line["over one stream on P times the tokens"] for line in found.table]
    assert [told.split()[0] for told in of_equal_compute] == ["+0.0500", "+0.1000", "not"]  # every control is the same


@pytest.mark.parametrize(("gain", "outcome"), [(0.05, "supported"), (0.0, "undecided"), (-0.05, "undecided")])
def test_together_wants_a_gain_at_every_size(gain: float, outcome: str) -> None:
    """At the smallest model it is there; at the largest it is `gain`."""
    rows = []
    for factor, of_size in ((4, gain), (0.25, 0.1)):
        rows += seeds(f"control, {factor:g} × size and tokens", *CONTROL)
        rows += seeds(f"P=4, {factor:g} × size and tokens", *(loss - of_size for loss in CONTROL))
    found = verdict("together", rows)
    assert found.outcome == outcome
    assert [x for x, _ in found.curves["code"]] == [-2.0, 2.0]
    assert f"smallest one's on code: {gain - 0.1:+.4f}" in found.reason


@pytest.mark.parametrize(("kept", "outcome"), [(0.19, "undecided"), (0.1, "not supported"), (0.2, "supported")])
def test_split_asks_for_95_percent_of_the_gain(kept: float, outcome: str) -> None:
    """Of a gain of 0.2 nats, 0.1906 are needed."""
    rows = seeds("control, tokens of share 1", *CONTROL) + seeds("share 1", 2.8, 2.9, 3.0)
    rows += seeds("control, 0.02 of the tokens", 2.5, 2.6, 2.7)
    rows += seeds("0.02 of the tokens", 2.5 - kept, 2.6 - kept, 2.7 - (0.2 if outcome == "undecided" else kept))
    found = verdict("split", rows)
    assert found.outcome == outcome
    assert "2% of them in stage 2: gain +0.1" in found.reason or kept == 0.2


def test_split_tells_what_equal_compute_gives_beside() -> None:
    rows = seeds("control", *CONTROL) + seeds("share 1", 2.8, 2.9, 3.0) + seeds("share 0.1", 2.9, 3.0, 3.1)
    found = verdict("split", rows)
    assert (found.outcome, "with 10% of the compute in stage 2, gain +0.1" in found.reason) == ("not run", True)


def test_where_nothing_was_gained_nothing_is_kept() -> None:
    """Both lose to the control, one of them less: four fifths of a loss are no share of a gain."""
    rows = seeds("control, tokens of share 1", *CONTROL) + seeds("share 1", *(loss + 0.3 for loss in CONTROL))
    rows += seeds("control, 0.02 of the tokens", *CONTROL)
    rows += seeds("0.02 of the tokens", *(loss + 0.05 for loss in CONTROL))
    assert verdict("split", rows).outcome == "undecided"
    of: Any = {"streams": 4, "measured": {"weights": [0.4, 0.2, 0.2, 0.2]}}
    rows = seeds("pretrain, control", *CONTROL) + seeds("pretrain, P=4, own", *(loss + 0.1 for loss in CONTROL), **of)
    found = verdict("sharing", rows + seeds("pretrain, P=4, shared", *(loss + 0.06 for loss in CONTROL), **of))
    assert (found.outcome, "no gain to keep" in found.reason) == ("undecided", True)
    assert [line["of the own gain"] for line in found.table] == ["", ""]


def test_moe_wants_both_kinds_to_gain() -> None:
    rows = seeds("dense, control", *CONTROL) + seeds("sparse, control", *CONTROL)
    rows += seeds("dense, P=2", 2.9, 3.0, 3.1, streams=2) + seeds("sparse, P=2", 2.8, 2.9, 3.0, streams=2)
    assert verdict("moe", rows).outcome == "supported"
    assert "sparse over dense: +0.1000" in verdict("moe", rows).reason


def test_domains_compares_with_the_lora_and_tells_what_is_forgotten() -> None:
    home = {"corpora": {"forgetting": {"before": 2.0, "after": 2.5}}, "stream_parameters": 7}
    rows = seeds("control", *CONTROL, **home) + seeds("P=4, prefix+lora", 2.8, 2.9, 3.0, **home)
    found = verdict("domains", rows + seeds("LoRA", 2.9, 3.0, 3.1, **home))
    assert found.outcome == "supported"
    assert found.table[0]["loss at home rises by"].startswith("+0.5000 [+0.5000, +0.5000]")


def test_balance_holds_the_chosen_remedy_against_none() -> None:
    one, all_eight = {"weights": [0.95, 0.05]}, {"weights": [0.6, 0.4]}
    rows = seeds("control", *CONTROL) + seeds("P=8, no remedy", *CONTROL, measured=one)
    rows += seeds("P=8, slow head", 2.9, 3.0, 3.1, measured=all_eight)
    rows += seeds("P=8, decorrelation", 2.8, 2.9, 3.0, measured=one)
    found = verdict("balance", rows)
    assert found.outcome == "supported"
    assert found.reason.startswith("P=8 on code: slow head over no remedy +0.1")
    assert [line["monoculture"] for line in found.table] == ["3 of 3", "0 of 3", "3 of 3"]


@pytest.mark.parametrize(("kept", "outcome"), [(0.19, "supported"), (0.1, "not supported")])
def test_sharing_asks_for_four_fifths_of_the_own_gain(kept: float, outcome: str) -> None:
    rows, of = [], {"streams": 4, "measured": {"weights": [0.4, 0.2, 0.2, 0.2]}}
    for place in ("pretrain", "frozen"):
        rows += seeds(f"{place}, control", *CONTROL) + seeds(
            f"{place}, P=4, own", *(loss - 0.2 for loss in CONTROL), **of
        )
        rows += seeds(f"{place}, P=4, shared", *(loss - kept for loss in CONTROL), **of)
    rows += seeds("pretrain, P=4, shared, no prefix", *CONTROL, **of)  # a variant decides nothing
    found = verdict("sharing", rows)
    assert found.outcome == outcome
    assert found.reason.startswith(f"pretrain, P=4 on code: {kept / 0.2:.0%} kept")
    assert found.curves["code, frozen, own"] == [(4.0, pytest.approx(0.2))]


def test_shared_keys_stand_beside_own_ones_with_the_same_remedy() -> None:
    """A variant that own keys have not stands beside own keys as they come."""
    of: Any = {"streams": 4, "measured": {"weights": [0.4, 0.2, 0.2, 0.2]}}
    rows = seeds("pretrain, control", *CONTROL)
    for name, gain in {
        "own": 0.2,
        "own, load balance": 0.4,
        "shared, load balance": 0.2,
        "shared, no prefix": 0.2,
    }.items():
        rows += seeds(f"pretrain, P=4, {name}", *(loss - gain for loss in CONTROL), **of)
    kept = {line["run"].split(", ", 2)[2]: line["of the own gain"] for line in verdict("sharing", rows).table}
    equal = seeds("pretrain, P=1, LoRA of 4 streams", *(loss - 0.05 for loss in CONTROL))
    table = {line["run"]: line for line in verdict("sharing", rows + equal).table}
    assert table["pretrain, P=4, own"]["over as many LoRA parameters"].startswith("+0.15")
    assert table["pretrain, P=1, LoRA of 4 streams"]["gain over control"].startswith("+0.05")
    assert kept == {"own": "", "own, load balance": "", "shared, load balance": "50%", "shared, no prefix": "100%"}


def test_diversifiers_holds_a_lora_each_against_the_prefix_alone() -> None:
    of = {"stream_parameters": 7, "streams": 4, "measured": {"weights": [0.3, 0.3, 0.2, 0.2], "cosine": 0.5}}
    rows = seeds("control", *CONTROL) + seeds("P=4, prefix", 3.0, 3.1, 3.19, **of)
    rows += seeds("P=4, prefix+lora", 2.9, 3.0, 3.1, **of) + seeds("P=4, prefix+rank1", 3.0, 3.1, 3.2, **of)
    found = verdict("diversifiers", rows)
    assert found.outcome == "supported"
    assert found.reason.startswith("on code: P=4, prefix+lora over the prefix alone +0.09")


def test_rates_near_the_chosen_ones_must_keep_half_of_the_gain_over_controls_of_their_own() -> None:
    of = {"streams": 4, "measured": {"weights": [0.3, 0.3, 0.2, 0.2]}}
    rows = seeds("control", *CONTROL) + seeds("control, streams at 2", 2.0, 2.1, 2.2)
    rows += seeds("head at 0.1", 2.9, 3.0, 3.1, **of) + seeds("head at 0.3", 2.93, 3.03, 3.13, **of)
    assert verdict("rates", rows).outcome == "supported"
    far = rows + seeds("head at 1", 3.0, 3.1, 3.2, **of)
    assert verdict("rates", far).outcome == "supported", "too far from the chosen one to count"
    lost = rows + seeds("head at 0.03", 2.96, 3.06, 3.16, **of)
    assert verdict("rates", lost).outcome == "undecided", "one part says no"
    lost = rows + seeds("streams at 2", 1.98, 2.08, 2.18, **of)
    assert verdict("rates", lost).outcome == "undecided", "lower than any, but hardly lower than its own control"
    assert verdict("rates", rows[:6]).outcome == "not run"


def test_lora_must_keep_most_of_what_four_times_its_rank_gains() -> None:
    def of(rank: int, streams: int = 4, **changes: Any) -> dict[str, Any]:
        chosen = {"streams": streams, "diversify": ["prefix", "lora"], "lora_rank": rank} | changes
        weights = [0.3, 0.3, 0.2, 0.2][:streams]
        measured = {"measured": {"weights": weights}, "stream_parameters": 100}
        return {"streams": streams, "run": {"streams": chosen}} | measured

    rows = []
    for place in ("from scratch", "frozen"):
        rows += seeds(f"{place}, control", *CONTROL)
        rows += seeds(f"{place}, rank × 1", 2.8, 2.9, 3.0, **of(8)) + seeds(
            f"{place}, rank × 4", 2.79, 2.89, 2.99, **of(32)
        )
    found = verdict("lora", rows)
    assert found.outcome == "supported"  # 0.2 is more than 0.8 of 0.21
    assert found.curves["code, frozen"] == [(8.0, pytest.approx(0.2)), (32.0, pytest.approx(0.21))]
    told = rows + seeds("frozen, MLP alone", 2.5, 2.6, 2.7, **of(8))
    told += seeds("frozen, one stream as large as with rank × 1", 2.9, 3.0, 3.1, **of(32, streams=1))
    found = verdict("lora", told)
    assert found.outcome == "supported", "they are told, and decide nothing"
    assert [line["projections"] for line in found.table][-2:] == ["gate_proj up_proj", "all"]
    assert found.table[2]["over one stream with as many LoRA parameters"].startswith("+0.1000")
    assert "frozen, MLP" not in found.curves
    lost = [row | {"validation_loss": row["validation_loss"] - 0.3 * row["name"].endswith("× 4")} for row in rows]
    assert verdict("lora", lost).outcome == "not supported"


def test_sft() -> None:
    rows = seeds("control", *CONTROL) + seeds("P=2", 3.1, 3.2, 3.3)
    assert verdict("sft", rows).outcome == "not supported"


def efficiency_rows(cases: dict[tuple[str, int], tuple[float, float]]) -> list[dict[str, Any]]:
    return [
        {
            "scale": "gpu", "size": size, "streams": p, "batch": 1, "latency_s": seconds, "memory_gib": gib,
            "layers": 36, "layers_of_model": 36, "machine": {"name": "M"},
            "measured": {"request": {"median": seconds, "q1": seconds, "q3": seconds}, "peak_gib": gib},
        }
        for (size, p), (gib, seconds) in cases.items()
    ]  # fmt: skip


def test_efficiency_gives_the_paper_s_ratios_for_the_paper_s_costs() -> None:
    """GiB and seconds of the released analysis, averaged over lengths: 22.55 and 6.43."""
    paper = {
        ("1.6B", 1): (3.442, 0.4825), ("1.6B", 8): (3.587, 0.5550),
        ("2.8B", 1): (5.832, 0.8227), ("4.4B", 1): (8.921, 1.2619),
    }  # fmt: skip
    found = efficiency.verdict(efficiency_rows(paper))
    assert found.outcome == "supported"
    assert found.table[0]["memory ratio, measured"] == pytest.approx(22.55, abs=0.1)
    assert found.table[0]["latency ratio, measured"] == pytest.approx(6.43, abs=0.03)
    slow = paper | {("1.6B", 8): (3.587, 2.0)}
    assert efficiency.verdict(efficiency_rows(slow)).outcome == "not supported"
    del paper["2.8B", 1]
    assert efficiency.verdict(efficiency_rows(paper)).outcome == "not run"


def test_an_unknown_experiment_is_refused() -> None:
    with pytest.raises(InputError, match="baseline, aggregation"):
        claim_named("basline")
