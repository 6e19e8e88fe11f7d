"""A run with what an honest report needs beside it: the control on the same tokens, and the losses before and after.

The control is one stream with a prefix (docs/claim.md): on small models the prefix alone gives much of the early gain.
"""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.load import RECORD, comes_with_streams
from parscale.output import print_table
from parscale.train.config import TrainConfig
from parscale.train.folder import CONTROL, TrainResult, check_output, hold_output
from parscale.train.parallel import is_first_process
from parscale.train.prepare import prepare
from parscale.train.trainer import train
from parscale.utils.files import write_text


def run(config: TrainConfig) -> TrainResult:
    """`train`, after the control if it is asked for, so that the log can hold the streams against it; prints the table,
    and completes `train.json` with `control`.

    Raises:
        InputError: as `train` does; or a control that cannot be: of one stream, or of a model that has streams already.
    """
    with hold_output(config.output) if is_first_process() else nullcontext():
        if not config.resume and is_first_process():
            check_output(config.output)
        if config.control:
            _check_control(config)
        text = prepare(config)
        control = train(control_of(config), data=text, title="control") if config.control else None
        result = train(config, data=text, control=config.output / CONTROL if control else None)
        if control and is_first_process():
            _complete(config.output / RECORD, result, control)
    if is_first_process():
        print_report(result, control)
    return result


def control_of(config: TrainConfig) -> TrainConfig:
    """The same run with one stream, a prefix and no head."""
    settings = config.streams
    prefix_tokens = settings.prefix_tokens or StreamsConfig().prefix_tokens
    one = StreamsConfig(streams=1, prefix_tokens=prefix_tokens, prefix_init=settings.prefix_init)
    return replace(config, streams=one, output=config.output / CONTROL, control=False)


def print_report(result: TrainResult, control: TrainResult | None) -> None:
    """Losses before and after, the gain over the control, and the same for every other corpus."""
    named = {f"P={result.streams['streams']}": result} | ({"control": control} if control else {})
    print_table(
        f"{result.stage} of {result.model}: validation loss, nats per token",
        [
            {
                "model": name,
                "tokens": one.tokens,
                "before": one.start_loss,
                "after": one.validation_loss,
                "gain over the control": control.validation_loss - one.validation_loss if control else None,
                "seconds": round(one.seconds),
            }
            for name, one in named.items()
        ],
    )
    print_table(
        "other corpora",
        [
            {"corpus": corpus, "model": name, **losses, "change": losses["after"] - losses["before"]}
            for name, one in named.items()
            for corpus, losses in one.corpora.items()
        ],
    )


def _check_control(config: TrainConfig) -> None:
    if config.streams.streams == 1:
        raise InputError("control with streams=1: one stream with a prefix is the control itself; leave control out")
    if config.stage != "pretrain" and comes_with_streams(config.model):
        raise InputError(
            f"control with model={config.model!r}, which has streams already: its control started where they were "
            "added; train that one on with the same settings, and compare"
        )


def _complete(path: Path, result: TrainResult, control: TrainResult) -> None:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    record[CONTROL] = asdict(control) | {"gain": control.validation_loss - result.validation_loss}
    write_text(path, json.dumps(record, indent=1))
