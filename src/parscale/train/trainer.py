"""Training with streams: Hugging Face's Trainer, given the stages' parameter groups and a look at the streams.

`train(TrainConfig(...))` is what `parscale train` calls.
"""

import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.load import first_line, load_model, load_tokenizer
from parscale.probe import StreamProbe, probe_streams
from parscale.streams.backbone import has_streams, streams_of
from parscale.streams.parallelize import parallelize
from parscale.train.config import TrainConfig
from parscale.train.data import PackedText, load_text
from parscale.train.progress import ProgressBar
from parscale.train.shapes import build, check_vocabulary
from parscale.train.stages import Rates, count_stream_parameters, freeze_backbone, parameter_groups


@dataclass(frozen=True)
class TrainResult:
    """What a run gave. Losses are nats per token on the held-out text; `history` has one row per log or evaluation."""

    output: str
    stage: str
    model: str
    streams: dict[str, Any]
    seed: int
    tokens: int
    steps: int
    parameters: int
    stream_parameters: int
    start_loss: float
    validation_loss: float
    probe: dict[str, Any] | None
    seconds: float
    history: list[dict[str, Any]]


class StreamsTrainer(Trainer):
    """Hugging Face's Trainer with the stages' parameter groups; its logs show the streams' weights and correlation.

    Args:
        rates: learning rates by parameter group.
        watch: token ids (B, T) of held-out text that the streams are looked at on, at every log.
    """

    def __init__(self, *args: Any, rates: Rates, watch: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rates = rates
        self.watch = watch
        self.gradients: dict[str, float] = {}
        self.add_callback(_GradientNorms(self.gradients))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's own optimizer class over `stages.parameter_groups`."""
        if self.optimizer is None:
            module: Any = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, module)
            self.optimizer = optimizer_class(parameter_groups(module, self.rates), **options)
        return self.optimizer  # type: ignore[return-value]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the streams do now to every training log."""
        if "loss" in logs:
            logs |= self.gradients
        if "loss" in logs and (seen := self.probe()) is not None:
            logs |= {f"streams/weight_{i}": w for i, w in enumerate(seen.weights)}
            logs |= {"streams/effective": seen.effective_streams, "streams/cosine": seen.cosine or 0.0}
        super().log(logs, start_time)

    def probe(self) -> StreamProbe | None:
        """The streams on the watched text; None for a model with one stream."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if self.watch is None or not has_streams(model) or model.streams == 1:
            return None
        return probe_streams(model, self.watch)


class _GradientNorms(TrainerCallback):
    """Keeps the gradient's norm in each parameter group, for the log of the same step. Clipping is done by then."""

    def __init__(self, norms: dict[str, float]) -> None:
        self.norms = norms

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if (state.global_step + 1) % state.logging_steps:
            return
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if gradients:
                self.norms[f"gradients/{group['name']}"] = torch.nn.utils.get_total_norm(gradients).item()


def train(config: TrainConfig, *, data: PackedText | None = None, title: str | None = None) -> TrainResult:
    """Run one stage and save the model, its tokenizer and `train.json` into `config.output`.

    Args:
        config: the run.
        data: text that is packed already, instead of `config.data`.
        title: what the progress bar is called.

    Raises:
        InputError: bad text, model, folder or settings; nothing is left half-written.
    """
    check_output(config.output)
    set_seed(config.seed)
    tokenizer = _tokenizer(config) if data is None else data.tokenizer
    data = data or load_text(
        config.data,
        validation=config.validation or None,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        block_size=config.block_size,
        text_column=config.text_column,
        cache_dir=config.cache_dir,
    )
    model = _model(config, data)
    freeze_backbone(model, config.stage)
    if config.gradient_checkpointing:
        # transformers 5.17 knows only the second name; later ones warn of it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    validation = data.validation.select(range(min(len(data.validation), config.validation_blocks)))
    tokens_per_step = config.batch_size * data.block_size
    steps = max(1, (config.tokens or data.train_tokens) // tokens_per_step)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer wants a folder, though nothing is saved there
        trainer = StreamsTrainer(
            model=model,
            args=_arguments(config, steps, scratch),
            train_dataset=data.train,
            eval_dataset=validation,
            data_collator=default_data_collator,
            rates=config.rates,
            watch=torch.as_tensor(validation[:4]["input_ids"]),
        )
        trainer.remove_callback(PrinterCallback)
        start_loss = trainer.evaluate()["eval_loss"]
        trainer.add_callback(ProgressBar(title or f"{config.stage} P={_streams(model)}", tokens_per_step))
        trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
    seen = trainer.probe()
    result = TrainResult(
        output=str(config.output),
        stage=config.stage,
        model=config.model,
        streams=(streams_of(model) if has_streams(model) else StreamsConfig(1, 0)).to_dict(),
        seed=config.seed,
        tokens=steps * tokens_per_step,
        steps=steps,
        parameters=model.num_parameters(),
        stream_parameters=count_stream_parameters(model),
        start_loss=start_loss,
        validation_loss=next(row["eval_loss"] for row in reversed(history) if "eval_loss" in row),
        probe=seen.to_dict() if seen else None,
        seconds=time.monotonic() - started,
        history=history,
    )
    save_run(model, data.tokenizer, config.output, {"result": asdict(result), "config": _plain(asdict(config))})
    return result


def save_run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path, record: dict[str, Any]) -> None:
    """Write model, tokenizer and `train.json` under a temporary name, then rename: the folder is whole or absent."""
    scratch = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "train.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        if output.exists():
            output.rmdir()  # check_output saw that it is empty
        scratch.rename(output)
    except Exception as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) or "No space left" in str(error):
            raise InputError(f"output={output}: cannot write there ({first_line(error)}); nothing was kept") from error
        raise


def check_output(output: Path) -> None:
    """Refuse, before any work, an output folder that is not empty or that cannot be written.

    Raises:
        InputError: naming the folder and the reason.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output={output} exists and is not an empty folder; give another name or remove it")
    probe = output.with_name(f".{output.name}.partial")
    try:
        probe.mkdir(parents=True, exist_ok=True)
        probe.rmdir()
    except OSError as error:
        raise InputError(f"output={output}: cannot write there ({error.strerror or error})") from None


def _tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase | None:
    name = config.tokenizer or (None if config.stage == "pretrain" else config.model)
    if name is None:
        return None
    return load_tokenizer(name)


def _model(config: TrainConfig, data: PackedText) -> Any:
    if config.stage == "pretrain":
        model: Any = build(config.model, data.tokenizer, data.block_size)
    else:
        model = load_model(config.model)
        check_vocabulary(model.config.vocab_size, data.tokenizer, config.model)
    if has_streams(model):
        if config.streams not in (StreamsConfig(), streams_of(model)):
            raise InputError(
                f"model={config.model!r} has streams of its own ({streams_of(model).to_dict()}); leave out the flags "
                "of the streams to go on with them"
            )
        return model
    if config.streams.is_plain:
        return model
    calibration = torch.as_tensor(data.train[:4]["input_ids"])
    return parallelize(model, config.streams, calibration=calibration)


def _arguments(config: TrainConfig, steps: int, folder: str) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.gradient_clip,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(config.decay * steps), "decay_type": "linear"},
        warmup_steps=round(config.warmup * steps),
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        eval_strategy="steps",
        eval_steps=-(-steps // config.evaluations),
        logging_steps=max(1, steps // 40),
        save_strategy="no",
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to=config.report_to,
        seed=config.seed,
        data_seed=config.seed,
        dataloader_pin_memory=on_gpu,
    )


def _streams(model: Any) -> int:
    return model.streams if has_streams(model) else 1


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values, default=str))
