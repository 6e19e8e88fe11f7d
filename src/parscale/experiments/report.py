"""Draws results: self-contained HTML pages, with the plots inside as SVG, that read offline and in any browser."""

import html
import io
import re
from collections.abc import Sequence
from typing import Any

_NUMBER = re.compile(r"[+-]?[\d.,]+(e[+-]?\d+)?%?")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { line-height: 1.2; } table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .35rem .75rem; border-bottom: 1px solid #d0d7de; text-align: right; }
td.text, th.text { text-align: left; } td { vertical-align: top; }
caption { text-align: left; font-weight: 600; padding: .35rem 0; }
pre { background: #f6f8fa; padding: .75rem; overflow-x: auto; white-space: pre-wrap; }
a { white-space: nowrap; } svg { width: 100%; height: auto; } details { margin: 1rem 0; } summary { cursor: pointer; }
@media (max-width: 40rem) { td.text { min-width: 7rem; } }
.note { color: #57606a; }
"""


def write_demo_report(record: dict[str, Any]) -> str:
    """The demo's `report.html`, from what `demo.json` holds."""
    rows = record["rows"]
    gains = {row["name"]: row["gain"] for row in rows if row["streams"] > 1}
    best = max(gains, key=lambda name: gains[name])
    sentence = (
        f"{best} ends {abs(gains[best]):.4f} nats per token {'below' if gains[best] > 0 else 'above'} the control: "
        "P=1 with the same prefix, the same base model, the same tokens in the same order."
    )
    machine = record["machine"]
    parts = [
        "<h1>Parallel streams on real text</h1>",
        f"<p><strong>{html.escape(sentence)}</strong></p>",
        '<p class="note">One seed. How much it moves from seed to seed, and what was tried, stands in LOG.md.</p>',
        table(
            "Validation loss after stage 2",
            ("model", "loss (nats)", "gain over control", "ρ of errors", "cosine", "weights", "added parameters"),
            [
                (
                    row["name"],
                    f"{row['validation_loss']:.4f}",
                    "" if row["gain"] is None else f"{row['gain']:+.4f}",
                    "" if row["error_correlation"] is None else f"{row['error_correlation']:.2f}",
                    "" if row["cosine"] is None else f"{row['cosine']:.3f}",
                    " / ".join(f"{w:.2f}" for w in row["weights"] or []),
                    f"{row['stream_parameters']:,}",
                )
                for row in rows
            ],
        ),
        "<h2>Validation loss in stage 2</h2>",
        svg(_draw_losses, record["history"]),
        "<h2>Weights of the streams</h2>",
        svg(_draw_weights, record["history"]),
        "<h2>Completions</h2>",
    ]
    for entry in record["completions"]:
        text = html.escape(entry["prompt"]) + "<strong>" + html.escape(entry["completion"]) + "</strong>"
        parts.append(f"<p>{html.escape(entry['model'])}</p><pre>{text}</pre>")
    parts.append(
        f'<p class="note">Corpus: {html.escape(", ".join(record["corpus"]))}. {record["seconds"]:.0f} s on '
        f"{html.escape(str(machine['processor'] or machine['platform']))}, {machine['threads']} threads, torch "
        f"{html.escape(machine['torch'])}, transformers {html.escape(machine['transformers'])}.</p>"
    )
    return page("Parallel streams on real text", "\n".join(parts))


def page(title: str, body: str) -> str:
    """A whole HTML document that needs no network."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of plain strings, escaped. A cell `#name` is a link to that place of the page."""
    kinds = [_kind([row[place] for row in rows]) for place in range(len(columns))]
    head = "".join(f'<th scope="col"{kind}>{html.escape(column)}</th>' for kind, column in zip(kinds, columns))
    lines = ("".join(f"<td{kind}>{_linked(cell)}</td>" for kind, cell in zip(kinds, row)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _kind(cells: Sequence[str]) -> str:
    """Words stand left, numbers right, so that their digits can be compared."""
    return "" if all(_NUMBER.fullmatch(cell) for cell in cells if cell) else ' class="text"'


def _linked(cell: str) -> str:
    told = html.escape(cell)
    return f'<a href="{told}">{told[1:]}</a>' if told.startswith("#") else told


def svg(draw: Any, *args: Any) -> str:
    """What `draw(figure, *args)` draws, as an inline SVG element."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    draw(figure, *args)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw_losses(figure: Any, history: dict[str, list[dict[str, Any]]]) -> None:
    axes = figure.subplots()
    for name, rows in history.items():
        points = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
        if name != "base" and points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="step of stage 2", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_weights(figure: Any, history: dict[str, list[dict[str, Any]]]) -> None:
    streamed = {name: rows for name, rows in history.items() if any("streams/weight_0" in row for row in rows)}
    panels = figure.subplots(1, len(streamed), sharey=True, squeeze=False)[0]
    for axes, (name, rows) in zip(panels, streamed.items(), strict=True):
        seen = [row for row in rows if "streams/weight_0" in row]
        keys = sorted(key for key in seen[0] if key.startswith("streams/weight_"))
        for i, key in enumerate(keys):
            axes.plot([row["step"] for row in seen], [row[key] for row in seen], label=f"stream {i + 1}")
        axes.set(title=name, xlabel="step of stage 2", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("mean aggregation weight")
