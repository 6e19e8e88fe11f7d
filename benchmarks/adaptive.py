"""A p for every token: the loss for each share of hard tokens, and what they cost.

    parscale train pretrain --output m --streams 4 --diversify prefix lora --kv shared --fewer-streams 0.5
    python benchmarks/adaptive.py m

MODEL has streams that share keys and values, and was trained at fewer of them too (`--fewer-streams`): else its first
stream alone is no model. A row: the entropy above which a token is hard, the share of hard tokens,
the loss in nats, and the passes of one stream that a token takes on average (1 for an easy one, 1 + P for a hard one).
"""

import argparse
from dataclasses import asdict

import torch
from record import write

import parscale  # noqa: F401  registers the families
from parscale.load import load_model, load_tokenizer
from parscale.streams.adaptive import adaptive_losses
from parscale.train.data import load_text


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model")
    arguments.add_argument("--data", nargs="+", default=["stdlib"])
    arguments.add_argument("--sequences", type=int, default=64)
    arguments.add_argument("--block-size", type=int, default=128)
    arguments.add_argument("--name", default="adaptive")
    options = arguments.parse_args()
    model, tokenizer = load_model(options.model).eval(), load_tokenizer(options.model)
    text = load_text(options.data, tokenizer=tokenizer, block_size=options.block_size)
    ids = torch.as_tensor(text.validation[: options.sequences]["input_ids"])
    rows = []
    for row in adaptive_losses(model, ids):
        passes = round(1 + row.share * model.streams, 3)
        rows.append({k: round(v, 4) for k, v in asdict(row).items()} | {"passes": passes})
        print(rows[-1])
    print(write(options.name, vars(options) | {"streams": model.streams}, rows))


if __name__ == "__main__":
    main()
