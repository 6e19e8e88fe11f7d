"""What a run is to the law: a row of params, streams and loss (tokens, seed and size if known), read and checked.

`params` counts non-embedding parameters, those of the streams included, as the paper's tables do. The paper's own
48 losses live beside this file.
"""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from parscale.errors import InputError

CORPORA = ("stack", "pile")
SAME_SIZE = 1.1
"""Two runs whose params differ by less than this factor are one size: streams add up to 2 % to the paper's models."""


@dataclass(frozen=True)
class Runs:
    """Trained models as columns, all float64 of shape (runs,).

    `params`: non-embedding parameters. `streams`: P. `loss`: nats a token. `tokens`: training tokens, or None.
    `size`: (runs,) integers; runs with equal numbers are one model at different P.
    """

    params: np.ndarray
    streams: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray | None
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def configuration(self) -> np.ndarray:
        """(runs,) integers, numbered as they come: equal for runs that differ in nothing but their seed."""
        tokens = np.zeros(len(self)) if self.tokens is None else self.tokens
        rows = np.stack([self.params, self.streams, tokens], axis=1)
        _, first, number = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[number]

    def surround(self, params: float, streams: float, tokens: float | None = None) -> bool:
        """Whether a model is among the sizes, P and tokens of the runs: elsewhere a law is an extrapolation."""
        told = [(self.params, params), (self.streams, streams)]
        if tokens is not None and self.tokens is not None:
            told.append((self.tokens, tokens))
        return all(bool(seen.min() <= value <= seen.max()) for seen, value in told)

    def take(self, rows: np.ndarray) -> "Runs":
        """The rows at these positions (integers, repeats allowed) or under this mask (booleans)."""
        tokens = None if self.tokens is None else self.tokens[rows]
        return Runs(self.params[rows], self.streams[rows], self.loss[rows], tokens, self.size[rows])


def paper(corpus: str) -> list[dict[str, float]]:
    """The paper's 24 losses on `corpus` ("stack": Stack-V2-Python, or "pile"): rows of params, streams, loss."""
    if corpus not in CORPORA:
        raise InputError(f"corpus {corpus!r} is not known: choose one of {', '.join(CORPORA)}")
    text = resources.files("parscale.law").joinpath("paper.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    keep = ("params", "streams", "loss")
    return [{name: float(row[name]) for name in keep} for row in rows if row["corpus"] == corpus]


def read_runs(runs: Any) -> Runs:
    """Runs from a CSV path, a list of dicts or a DataFrame. Columns params, streams, loss; optional tokens, seed, size.

    Other columns are ignored. Raises InputError for a missing column, a number that is not positive and finite, and
    rows that repeat (same params, streams, tokens and seed).
    """
    rows = _rows(runs)
    if not rows:
        raise InputError("runs are empty: rows with the columns params, streams, loss are needed")
    columns = {name: _column(rows, name) for name in ("params", "streams", "loss")}
    if np.any(columns["streams"] < 1):
        where = int(np.argmin(columns["streams"])) + 1
        raise InputError(f"streams in row {where} is {columns['streams'].min():g}: a run has at least 1 stream")
    tokens = _column(rows, "tokens") if _has(rows[0], "tokens") else None
    _refuse_repeats(rows)
    size = _column(rows, "size", any_text=True) if _has(rows[0], "size") else _sizes(columns["params"])
    return Runs(**columns, tokens=tokens, size=size)


def _rows(runs: Any) -> list[Mapping[str, Any]]:
    if isinstance(runs, str | Path):
        path = Path(runs)
        if not path.is_file():
            raise InputError(
                f"runs file {str(path)!r} does not exist, or is no file: "
                "give a CSV with the columns params, streams, loss"
            )
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a mark in front
                return list(csv.DictReader(file, skipinitialspace=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"runs file {str(path)!r} is not a CSV in UTF-8: {error}") from None
    if hasattr(runs, "to_dict") and hasattr(runs, "columns"):  # a DataFrame, without importing pandas
        return runs.to_dict("records")
    if not isinstance(runs, Iterable) or isinstance(runs, Mapping):
        raise InputError(f"runs is a {type(runs).__name__}: give a CSV path, a list of dicts or a DataFrame")
    rows = list(runs)
    if not all(isinstance(row, Mapping) for row in rows):
        raise InputError("runs holds something that is not a dict: each row needs the keys params, streams, loss")
    return rows


def _has(row: Mapping[str, Any], name: str) -> bool:
    return name in row and row[name] not in (None, "")


def _column(rows: list[Mapping[str, Any]], name: str, any_text: bool = False) -> np.ndarray:
    """One column as (rows,) float64, or as integers that number its distinct values when it may be any text."""
    missing = [i for i, row in enumerate(rows, 1) if not _has(row, name)]
    if missing:
        raise InputError(f"runs lack {name!r} in row {missing[0]}: each row needs params, streams and loss")
    if any_text:
        return np.unique([str(row[name]) for row in rows], return_inverse=True)[1]
    values = np.empty(len(rows))
    for i, row in enumerate(rows):
        try:
            values[i] = float(row[name])
        except (TypeError, ValueError):
            values[i] = math.nan
        if not (math.isfinite(values[i]) and values[i] > 0):
            raise InputError(f"{name} in row {i + 1} is {row[name]!r}: a positive, finite number is needed")
    return values


def _refuse_repeats(rows: list[Mapping[str, Any]]) -> None:
    seen: dict[tuple, int] = {}
    for i, row in enumerate(rows, 1):
        numbers = tuple(float(row[name]) for name in ("params", "streams", "tokens") if _has(row, name))
        key = (*numbers, str(row.get("seed", "")))
        if key in seen:
            raise InputError(
                f"rows {seen[key]} and {i} repeat params={numbers[0]:.0f}, streams={numbers[1]:g}: "
                "drop one, or tell them apart by a seed column"
            )
        seen[key] = i


def _sizes(params: np.ndarray) -> np.ndarray:
    """Number the sizes: in ascending order of params, a new one begins where the next step is over SAME_SIZE."""
    order = np.argsort(params)
    steps = params[order][1:] > SAME_SIZE * params[order][:-1]
    size = np.empty(len(params), dtype=int)
    size[order] = np.concatenate([[0], np.cumsum(steps)])
    return size
