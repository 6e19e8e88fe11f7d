"""Two experiments from the command line to the report, at their smallest."""

from pathlib import Path

import pytest

from parscale.cli import main
from parscale.experiments.catalogue import CLAIMS
from parscale.experiments.runs import SCALES
from parscale.experiments.sweep import read_rows
from tests.corpora import write_corpus


def test_two_experiments_and_their_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path / "cache"))
    write_corpus(Path("corpus"))
    assert main(["experiment", "baseline", "aggregation", "--corpus", "code=corpus"]) == 0
    told = capsys.readouterr().out
    assert "baseline, smoke: machinery only. Gain over the control: P=2, prefix on code: " in told
    assert "aggregation, smoke: machinery only. Learned weights over the mean" in told
    rows = {name: read_rows(Path(f"results/{name}.jsonl")) for name in ("baseline", "aggregation")}
    for name, of in rows.items():
        assert {row["name"] for row in of} == {run.name for run in CLAIMS[name].runs(SCALES["smoke"], ["code"])}
        assert len({(row["fingerprint"], row["tokens"], row["seed"]) for row in of}) == 1
        assert all(row["validation_loss"] < row["start_loss"] for row in of)
    control, again = (next(row for row in of if row["name"] == "control") for of in rows.values())
    assert again == control | {"experiment": "aggregation"}  # taken over, not trained again
    assert main(["report", "results"]) == 0
    assert "machinery only" in Path("results/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("nothing",), "'nothing' is not known"),
        (("domains", "--corpus", "a=x"), "domains needs 2 texts"),
        (("sft", "--corpus", "a=x"), "sft needs instructions with answers: --chats"),
        (("sft", "--corpus", "a=x", "--chats", "a=y"), "chats=a has the name of a text"),
        (("sft", "--chats", "a=not/there.jsonl"), "not/there.jsonl: there is no such file or folder"),
        (("all", "--corpus", "a=not/there.txt"), "not/there.txt: there is no such file or folder"),
        (("baseline", "--seeds", "0"), "seeds=0"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_paper_s_scale_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", "all", "--scale", "paper"]) == 0
    told = capsys.readouterr().out
    for name in CLAIMS:
        if CLAIMS[name].runs(SCALES["paper"], ["paper"]):
            assert f"{name}: not run; " in told
    assert list(tmp_path.iterdir()) == []
