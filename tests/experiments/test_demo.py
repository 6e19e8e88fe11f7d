"""The demo at its smallest: the same files and the same honest comparison as the real one."""

import json
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from parscale.errors import InputError
from parscale.experiments.demo import _complete, run_demo
from parscale.load import load_model
from tests.corpora import write_corpus


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    corpus = write_corpus(folder / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARSCALE_CACHE", str(folder / "cache"))
        run_demo(folder / "out", data=[str(corpus)], scale="smoke")
    return folder / "out"


def test_a_completion_may_have_brackets(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parscale.experiments.demo.complete", lambda *args, **options: "a[0] = re[/a-z] [b]")
    console = Console(file=StringIO(), width=200)
    assert _complete(console, demo, ["control"])[0]["completion"] == "a[0] = re[/a-z] [b]"
    assert console.file.getvalue().count("a[0] = re[/a-z] [b]") == 3  # type: ignore[attr-defined]


def test_every_row_of_stage_2_saw_the_same_tokens_from_the_same_base(demo: Path) -> None:
    record = json.loads((demo / "demo.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert set(rows) == {"base", "control", "control + LoRA", "P=2", "P=4"}
    assert len({row["tokens"] for name, row in rows.items() if name != "base"}) == 1
    assert len({row["seed"] for row in rows.values()}) == 1
    for name in ("P=2", "P=4"):
        assert rows[name]["gain"] == pytest.approx(rows["control"]["validation_loss"] - rows[name]["validation_loss"])
        assert len(rows[name]["weights"]) == rows[name]["streams"]
        assert {"tokens", "seed", "validation_loss", "cosine", "weights", "seconds"} <= rows[name].keys()


def test_the_control_has_a_prefix_and_no_head(demo: Path) -> None:
    control = load_model(demo / "control")
    names = [name for name, _ in control.named_parameters()]
    assert any("prefix_k" in name for name in names)
    assert not any("aggregate_layer" in name or "stream_" in name for name in names)


def test_the_report_is_one_file_that_needs_no_network(demo: Path) -> None:
    page = (demo / "report.html").read_text(encoding="utf-8")
    links = _Links()
    links.feed(page)
    assert links.found == []
    assert page.count("<svg") == 2
    loss = next(row for row in json.loads((demo / "demo.json").read_text())["rows"] if row["name"] == "P=4")
    assert f"{loss['validation_loss']:.4f}" in page


@pytest.mark.parametrize("streams", [(), (1,), (2, 0)])
def test_streams_below_two_are_refused(streams: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="streams="):
        run_demo(tmp_path / "out", streams=streams)


class _Links(HTMLParser):
    """What a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fetched = {"src", "href"} if tag not in ("use", "a") else {"src"}
        self.found += [value for key, value in attrs if key in fetched and value and not value.startswith("#")]
