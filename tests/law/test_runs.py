"""Reading runs: every kind of source, the paper's data, and each bad input as one line that names it."""

from pathlib import Path

import numpy as np
import pytest

from parscale.errors import InputError
from parscale.law.runs import paper, read_runs

ROW = {"params": 1e9, "streams": 2, "loss": 1.5}


def test_the_paper_has_24_losses_a_corpus_six_sizes_four_p() -> None:
    for corpus in ("stack", "pile"):
        runs = read_runs(paper(corpus))
        assert len(runs) == 24
        assert sorted(set(runs.streams)) == [1, 2, 4, 8]
        assert [int((runs.size == s).sum()) for s in range(6)] == [4] * 6
    assert {(r["params"], r["streams"]): r["loss"] for r in paper("stack")}[(1571472384, 1)] == 1.0817


def test_dicts_csv_and_frame_are_the_same_runs(tmp_path: Path) -> None:
    rows = [ROW, {"params": 3e9, "streams": 1, "loss": 1.2}]
    path = tmp_path / "runs.csv"
    path.write_text("params,streams,loss,embedding\n1e9,2,1.5,7\n3e9,1,1.2,7\n")

    class Frame:
        columns = ("params", "streams", "loss")

        def to_dict(self, orient: str) -> list[dict]:
            assert orient == "records"
            return rows

    for source in (rows, path, str(path), Frame()):
        runs = read_runs(source)
        assert runs.params.tolist() == [1e9, 3e9]
        assert runs.streams.tolist() == [2, 1]
        assert runs.loss.tolist() == [1.5, 1.2]


def test_a_seed_tells_equal_runs_apart_and_a_size_column_groups_them() -> None:
    runs = read_runs(
        [ROW | {"seed": 0, "size": "a"}, ROW | {"seed": 1, "size": "a"}, ROW | {"params": 9e9, "size": "b"}]
    )
    assert runs.size.tolist() == [0, 0, 1]
    with pytest.raises(InputError, match="rows 1 and 2 repeat params=1000000000, streams=2"):
        read_runs([ROW, ROW])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "empty"),
        ([{"params": 1e9, "streams": 1}], "lack 'loss' in row 1"),
        ([ROW | {"loss": 0}], "loss in row 1 is 0"),
        ([ROW, ROW | {"params": 2e9, "loss": float("nan")}], "loss in row 2 is nan"),
        ([ROW | {"params": "many"}], "params in row 1 is 'many'"),
        ([ROW | {"streams": 0.5}], "streams in row 1 is 0.5"),
        (7, "runs is a int"),
        ([3], "not a dict"),
        ("/no/such.csv", "does not exist"),
    ],
)
def test_bad_runs_are_named_in_one_line(rows: object, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_runs(rows)
    assert "\n" not in str(caught.value)


def test_params_within_a_tenth_are_one_size() -> None:
    params = np.array([1.0e9, 1.05e9, 1.3e9, 1.0e9])
    runs = read_runs([{"params": n, "streams": p, "loss": 1.0} for p, n in enumerate(params, 1)])
    assert runs.size.tolist() == [0, 0, 1, 0]
