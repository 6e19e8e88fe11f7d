"""A p for every token: the loss for each share of hard tokens, and what they cost.

    parscale train pretrain --output m --streams 4 --diversify prefix lora --kv shared --fewer-streams 0.5
    python benchmarks/adaptive.py m --plot adaptive.png

Each MODEL (a seed each, say) has streams that share keys and values, and was trained at fewer of them too
(`--fewer-streams`): else its first stream alone is no model. A row: the entropy above which a token is hard, the share
of hard tokens, the loss in nats, the passes of one stream that a token takes on average (1 for an easy one, P for a
hard one), and the share of the gain of all streams, which is the share of hard tokens if these are drawn at random.

Then the time of a step of some layers of the 0.54 B shape, random weights, float32, by batch: of one stream, of all,
and where all tokens are hard, in which all but the first run after it.
"""

import argparse
import itertools
from dataclasses import asdict
from typing import Any

import torch
from core import shape
from record import interleaved, summary, write
from transformers import AutoModelForCausalLM
from worker import Case

from parscale import HardTokens, StreamsConfig
from parscale.law.plot import save_figure
from parscale.load import load_model, load_tokenizer
from parscale.streams.adaptive import adaptive_losses
from parscale.streams.parallelize import over_its_weights
from parscale.train.data import load_text


def measure(folder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model."""
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    text = load_text(options.data, tokenizer=tokenizer, block_size=options.block_size)
    ids = torch.as_tensor(text.validation[: options.sequences]["input_ids"])
    losses = adaptive_losses(model, ids)
    alone, whole = losses[0].loss, losses[-1].loss
    rows = []
    for one in losses:
        told = asdict(one) | {
            "passes": 1 + one.share * (model.streams - 1),
            "gained": (alone - one.loss) / (alone - whole),
        }
        rows.append({"model": folder} | {k: round(v, 4) for k, v in told.items()})
        print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def token_times(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Median and quartiles, and the ratio to the token of one stream."""
    plain = AutoModelForCausalLM.from_config(shape(options.layers), dtype=torch.float32).eval()
    rows: list[dict[str, Any]] = []
    for streams, batch in itertools.product((4, 8), options.batches):
        model = over_its_weights(plain, StreamsConfig(streams, diversify=("prefix", "lora"), kv="shared"))
        ways: dict[str, Any] = {"one stream": 1, "all streams": streams, "hard": HardTokens(0.0, streams)}
        cases = {name: Case(model, way, batch=batch) for name, way in ways.items()}
        for case in cases.values():
            case.prefill(options.context)
        times = interleaved({name: case.decode for name, case in cases.items()}, options.rounds)
        about = {"streams": streams, "batch": batch, "layers": options.layers, "context": options.context}
        rows += [about | {"token": name} | summary(t, times["one stream"]) for name, t in times.items()]
        print(*rows[-3:], sep="\n", flush=True)
    return rows


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Share of the gain by passes, a line for each model; and what tokens drawn at random would give."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), dpi=160, layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        of_model = [row for row in rows if row["model"] == name]
        passes, gained = ([row[key] for row in of_model] for key in ("passes", "gained"))
        axes.plot(passes, gained, marker="o", markersize=3.5, label=f"most entropy, seed {i}")
    axes.plot([1, passes[-1]], [0, 1], color="0.6", linestyle="--", label="hard tokens drawn at random")
    axes.set(xlabel="passes of one stream a token", ylabel="share of the gain of all streams")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("models", nargs="+", metavar="MODEL")
    arguments.add_argument("--data", nargs="+", default=["stdlib"])
    arguments.add_argument("--sequences", type=int, default=64)
    arguments.add_argument("--block-size", type=int, default=128)
    arguments.add_argument("--plot")
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--context", type=int, default=256)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--name", default="adaptive")
    options = arguments.parse_args()
    rows = [row for folder in options.models for row in measure(folder, options)]
    if options.plot is not None:
        draw(rows, options.plot)
    print(write(options.name, vars(options), rows + token_times(options)))


if __name__ == "__main__":
    main()
