"""The 22x/6x claim: the headline and each variant, as worked out from the released script and the measured losses."""

import json
from pathlib import Path

import pytest

from parscale.cli import main
from parscale.cost.model import Workload
from parscale.law.claim import ASSUMPTIONS, claim, claim_ratios, draw_claim


def test_the_headline() -> None:
    ratios = claim_ratios()
    assert ratios.memory == pytest.approx(22.55, rel=0.002)
    assert ratios.latency == pytest.approx(6.43, rel=0.002)


@pytest.mark.parametrize(
    ("change", "memory", "latency"),
    [
        ({"rival": "fitted"}, 18.2, 5.2),
        ({"lengths": (64,)}, 40, 8.3),
        ({"corpus": "pile"}, 17.5, 5.0),
        ({"workload": Workload(batch=2)}, 12.9, 3.3),
        ({"workload": Workload(batch=4)}, 6.9, 1.7),
        ({"workload": Workload(batch=8)}, 3.6, 0.88),
    ],
)
def test_the_variants(change: dict, memory: float, latency: float) -> None:
    ratios = claim_ratios(**change)
    assert ratios.memory == pytest.approx(memory, rel=0.02)
    assert ratios.latency == pytest.approx(latency, rel=0.02)


def test_the_verb_prints_every_assumption_and_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["law", "claim"]) == 0
    text = capsys.readouterr().out
    result = claim()
    assert all(line in text for line in ASSUMPTIONS)
    assert all(row["variant"] in text for row in result["variants"])
    assert result["sentence"] in text
    assert main(["law", "claim", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["memory_ratio"] == result["memory_ratio"]
    assert printed["latency_ratio"] == result["latency_ratio"]


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    path = draw_claim(tmp_path / "new" / "claim.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in path.parent.iterdir()] == ["claim.png"]
