"""The report: a verdict for every claim, "not run" where there is nothing, and no network."""

import json
import re
from pathlib import Path

import pytest

from parscale.errors import InputError
from parscale.experiments.catalogue import CLAIMS
from parscale.experiments.experiment import planned
from parscale.experiments.results import write_report
from tests.experiments.rows import seeds
from tests.experiments.test_demo import _Links


def test_the_report(tmp_path: Path) -> None:
    rows = seeds("control", 3.0, 3.1, 3.2) + seeds("P=2, prefix", 2.9, 3.0, 3.1) + seeds("P=4, prefix", 2.8, 2.9, 3.0)
    rows += [one | {"corpus": "prose"} for one in rows]
    smoke = [row | {"scale": "smoke"} for row in seeds("control", 6.0)]
    file = tmp_path / "baseline.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in smoke + rows[::-1]))  # as workers write them
    page = write_report(tmp_path).read_text(encoding="utf-8")
    links = _Links()
    links.feed(page)
    assert links.found == []
    assert _cells(page)[:4] == ["baseline", "supported", "cpu", "18"]
    assert "+0.2000 [+0.2000, +0.2000], +2.0 sd, 3 seeds" in page
    assert page.count("<svg") == 1
    assert page.count("<p>Not run.</p>") == len(CLAIMS) - 1
    plan = planned(CLAIMS["baseline"])
    hours = sum(line["H100 hours"] for line in plan)
    assert _cells(page)[5] == f"not run, {hours:,} h"
    assert f"At the paper's scale: not run; {hours:,} hours of one H100" in page
    for line in plan:
        assert f'<td>{line["H100 hours"]}</td><td class="text">not run</td>' in page
    for name in CLAIMS:
        assert f'id="{name}"' in page
        assert f'href="#{name}"' in page
    assert "<li>P=2, prefix on code: " in page
    assert page.index(">control<") < page.index(">P=2, prefix<") < page.index(">P=4, prefix<")


def test_smoke_alone_decides_nothing(tmp_path: Path) -> None:
    rows = seeds("control", 3.0, 3.1, 3.2, scale="smoke") + seeds("P=2, prefix", 2.9, 3.0, 3.1, scale="smoke")
    (tmp_path / "baseline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path, tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert _cells(page)[:4] == ["baseline", "machinery only", "smoke", "6"]
    assert "<h3>smoke: machinery only</h3>" in page


def test_no_rows_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows"):
        write_report(tmp_path)


def _cells(page: str) -> list[str]:
    """Text of the first table's cells."""
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    return [re.sub("<[^>]*>", "", cell) for cell in re.findall("<td[^>]*>(.*?)</td>", body)]
