"""Training with streams: Hugging Face's Trainer, given the stages' parameter groups and a look at the streams.

`train(TrainConfig(...))` is what `parscale train` calls.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.load import load_model, on_accelerator
from parscale.output import say
from parscale.probe import StreamProbe
from parscale.streams.backbone import has_streams, streams_of
from parscale.train.balance import StreamBalance
from parscale.train.checkpoints import Checkpoints, run_of
from parscale.train.config import TrainConfig
from parscale.train.data import PackedText, sample
from parscale.train.faults import DEADLINE, FaultTolerance, OutOfTime, catching_sigterm, command_to_resume
from parscale.train.folder import TrainResult, check_output, finished_run, hold_output, save_run
from parscale.train.loss import IGNORED, chunked_loss
from parscale.train.model import base_of, model_of
from parscale.train.parallel import (
    check_launch,
    check_stream_parallel,
    check_zero_stage,
    is_first_process,
    mix_precision_of_shards,
    processes,
    same_batch_for,
    shard_on_cpu_too,
    split_streams,
    whole_parameters,
)
from parscale.train.prepare import prepare
from parscale.train.progress import ProgressBar
from parscale.train.separate import check_separate, collator
from parscale.train.sft import sft_arguments, sft_trainer
from parscale.train.stages import (
    Rates,
    count_stream_parameters,
    hold_backbone,
    parameter_groups,
    schedule,
    warn_of_rate,
)
from parscale.train.watch import StreamWatch, as_logs, details_as_logs


class StreamsTrainer(FaultTolerance, Trainer):
    """Hugging Face's Trainer with the stages' parameter groups; its logs show what the streams do.

    Args:
        rates: learning rates by parameter group.
        watch: looks at the streams at every log, and raises its alarms at evaluations.
        balance: what keeps the streams in use; its penalty is part of the training loss.
        corpora: more validation sets by name, whose loss is measured beside the main one.
        smooth: share of the past in the running mean of the validation loss, `eval_loss_smooth`.
        stream_parallel: split the streams over so many processes.
    """

    def __init__(
        self,
        *args: Any,
        rates: Rates,
        watch: StreamWatch | None = None,
        balance: StreamBalance | None = None,
        corpora: Mapping[str, Any] | None = None,
        smooth: float = 0.0,
        stream_parallel: int = 1,
        **kwargs: Any,
    ) -> None:
        self.stream_parallel = stream_parallel
        super().__init__(*args, **kwargs)
        self.rates = rates
        self.watch = watch
        self.corpora = dict(corpora or {})
        self.smooth = smooth
        self.balance = balance
        self._labels_per_row: float | None = None
        if balance is not None:
            self.add_callback(balance)
        if stream_parallel > 1:
            split_streams(base_of(self.model), stream_parallel)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own. After an interruption too, the model runs as it did before the step."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.balance is not None:
                self.balance.take_back()

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's own, with FSDP2 on CPUs too, and one batch for the processes that share its streams."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled |= shard_on_cpu_too(self.accelerator)
        mix_precision_of_shards(self.accelerator)
        check_zero_stage(self.accelerator)
        if self.stream_parallel > 1:
            same_batch_for(self.accelerator, self.stream_parallel)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's own optimizer class over `stages.parameter_groups`."""
        if self.optimizer is None:
            module: Any = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, module)
            self.optimizer = optimizer_class(parameter_groups(module, self.rates), **options)
        return self.optimizer  # type: ignore[return-value]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's own, in which the backbone may begin later."""
        if self.lr_scheduler is None:
            scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
            held = round(self.rates.backbone_delay * num_training_steps)
            if held:
                scheduler = hold_backbone(scheduler, held, self.args.get_warmup_steps(num_training_steps))
            self.lr_scheduler = scheduler
        return self.lr_scheduler

    def get_train_dataloader(self) -> Any:
        """The Trainer's own, without what makes no whole batch at the end of a pass: a few rows would have an
        optimizer step of their own, and be counted as a batch. They are others in every pass."""
        groups = self.accelerator.num_processes // self.stream_parallel
        self.args.dataloader_drop_last = len(self.train_dataset) >= groups * self.args.train_batch_size  # type: ignore[arg-type]
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = False  # it would hold for evaluations too

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The Trainer's own, and `eval_NAME_loss` for each of the other corpora."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None:
            for name, blocks in self.corpora.items():
                metrics |= super().evaluate(blocks, ignore_keys, f"{metric_key_prefix}_{name}")
        return metrics

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, with the loss in nats per label over the whole set. It takes the mean over rows of each
        batch's mean, in which the labels of a batch that has few weigh more."""
        rows = dataloader.dataset
        self._labels_per_row = sum(_labels(dataloader.collate_fn([row])) for row in rows) / len(rows)
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._labels_per_row = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's own, and the step's penalty. A step may have several micro-batches; each brings its share.

        In an evaluation: nats of this batch, over as many labels as its rows have on average in the whole set.
        """
        if self._labels_per_row is not None:
            weight = _labels(inputs) / (len(inputs["labels"]) * self._labels_per_row)
            computed: Any = super().compute_loss(model, inputs, return_outputs=return_outputs)
            return (computed[0] * weight, computed[1]) if return_outputs else computed * weight
        computed = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        penalty = self.balance.take_penalty() if self.balance is not None else None
        if penalty is None:
            return computed
        penalty = penalty / self.args.gradient_accumulation_steps
        return (computed[0] + penalty, computed[1]) if return_outputs else computed + penalty

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the gradients and the streams do now to every log of a training or validation loss."""
        if "loss" in logs:
            logs |= {f"gradients/{name}": norm for name, norm in self.gradients.items()}
            logs["skipped_steps"] = self.skipped
        if ("loss" in logs or "eval_loss" in logs) and (seen := self.probe()) is not None:
            logs |= as_logs(seen)
            if "eval_loss" in logs:
                logs |= self._details()
                if self.state.global_step > 0:
                    self._raise_alarms(seen)
        if "eval_loss" in logs:
            logs["eval_loss_smooth"] = self._smoothed(logs["eval_loss"])
        super().log(logs, start_time)

    def probe(self) -> StreamProbe | None:
        """The streams on the watched text; None for a model with one stream."""
        model = base_of(self.accelerator.unwrap_model(self.model))
        return self.watch.look(model) if self.watch is not None else None

    def _details(self) -> dict[str, float]:
        """What a close look at the streams tells the loggers; nothing of a model whose tensors are in pieces."""
        if self.watch is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return {}
        seen = self.watch.look_closely(base_of(self.accelerator.unwrap_model(self.model)))
        return {} if seen is None else details_as_logs(seen)

    def _raise_alarms(self, seen: StreamProbe) -> None:
        assert self.watch is not None
        for alarm in self.watch.alarms(seen, self.state.global_step):
            if self.is_world_process_zero():
                say(alarm)

    def _smoothed(self, loss: float) -> float:
        past = [row["eval_loss_smooth"] for row in self.state.log_history if "eval_loss_smooth" in row and row["step"]]
        return self.smooth * past[-1] + (1 - self.smooth) * loss if past else loss


def _labels(batch: Any) -> int:
    """How many tokens of a batch are predicted: the first of a row never is."""
    return int((batch["labels"][..., 1:] != IGNORED).sum())


class _EvaluateLast(TrainerCallback):
    """Evaluates after the last step too, where the steps between evaluations do not divide the run."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def train(
    config: TrainConfig,
    *,
    data: PackedText | None = None,
    title: str | None = None,
    control: Path | None = None,
    deadline: float | None = None,
) -> TrainResult:
    """Run one stage and save the model, its tokenizer and `train.json` into `config.output`.

    Args:
        config: the run.
        data: text that is packed already, instead of `config.data`.
        title: what the progress bar is called.
        control: folder of a model whose losses the streams' errors are measured against in the log.
        deadline: save and stop after the first step that ends behind it, in seconds of `time.time()`.

    Raises:
        InputError: bad text, model, folder or settings, or another process works in the folder; nothing is left
            half-written.
        OutOfTime: the run was stopped at its deadline.
    """
    check_launch(config)
    if config.report_to != "none" and find_spec(config.report_to) is None:
        raise InputError(f"report_to={config.report_to!r} needs a package: pip install {config.report_to}")
    with hold_output(config.output) if is_first_process() else nullcontext():
        if config.resume and (record := finished_run(config.output)) is not None:
            text, trained = _origin(config, data)
            Checkpoints(config.output, run_of(config, text, base_of(trained))).check_same(record["run"], "the end")
            say(f"{config.output} holds a run that has ended; nothing is left to do")
            return TrainResult(**record["result"])
        if is_first_process():
            check_output(config.output, resume=config.resume, control=control)
        return _run(config, data, title, control, deadline)


def _run(
    config: TrainConfig, data: PackedText | None, title: str | None, control: Path | None, deadline: float | None
) -> TrainResult:
    data, trained = _origin(config, data)
    model = base_of(trained)
    use_cache = getattr(model.config, "use_cache", True)  # the Trainer turns it off for good
    validation, *corpora = (
        blocks.select(range(min(len(blocks), config.validation_blocks)))
        for blocks in (data.validation, *data.corpora.values())
    )
    if config.stage != "frozen" and config.peft == "none" and is_first_process():
        warn_of_rate(config.learning_rate, model.get_input_embeddings().embedding_dim)
    if data.end_of_text is not None:
        check_separate(trained, data.end_of_text)
    check_stream_parallel(model, config.stream_parallel, processes())
    rows = min(processes() // config.stream_parallel * config.batch_size, len(data.train))  # of a step
    tokens_per_step = round(rows * data.tokens_per_row)
    steps = max(1, (config.tokens or data.train_tokens) // tokens_per_step)
    several = has_streams(model) and model.streams > 1
    balance = StreamBalance(model, config.balance, config.seed) if several and not config.balance.is_off else None
    checkpoints = Checkpoints(config.output, run_of(config, data, model), config.keep)
    newest = checkpoints.resume() if config.resume else None
    sft = config.stage == "sft"
    with nullcontext() if sft else chunked_loss(trained):
        make = sft_trainer(StreamsTrainer, data.tokenizer) if sft else StreamsTrainer
        trainer = make(
            model=trained,
            args=_arguments(config, steps, newest is None, sft_arguments if sft else TrainingArguments),
            train_dataset=data.train,
            eval_dataset=validation,
            data_collator=collator(data),
            rates=config.rates,
            watch=_watch(sample(validation, 4), control),
            balance=balance,
            corpora=dict(zip(data.corpora, corpora, strict=True)),
            smooth=config.smooth_validation,
            checkpoints=checkpoints,
            max_skipped=config.max_skipped,
            deadline=deadline,
            stream_parallel=config.stream_parallel,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_EvaluateLast())
        if config.patience is not None:
            trainer.add_callback(EarlyStoppingCallback(config.patience))
        trainer.add_callback(ProgressBar(title or f"{config.stage} P={_streams(model)}", tokens_per_step))
        with catching_sigterm(trainer.terminated.set):
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        _check_stopped(trainer)
    model.config.use_cache = use_cache
    start = {key: value for row in trainer.state.log_history if row["step"] == 0 for key, value in row.items()}
    history = [row for row in trainer.state.log_history if row["step"] and ("loss" in row or "eval_loss" in row)]
    seen = trainer.probe()
    result = TrainResult(
        output=str(config.output),
        stage=config.stage,
        model=config.model,
        streams=(streams_of(model) if has_streams(model) else StreamsConfig(1, 0)).to_dict(),
        seed=config.seed,
        tokens=trainer.state.global_step * tokens_per_step,
        steps=trainer.state.global_step,
        skipped_steps=trainer.skipped,
        parameters=model.num_parameters(),
        stream_parameters=count_stream_parameters(model),
        start_loss=start["eval_loss"],
        validation_loss=next(row["eval_loss"] for row in reversed(history) if "eval_loss" in row),
        corpora={
            name: {"before": start[key], "after": _last(trainer.state.log_history, key)}
            for name, key in ((name, f"eval_{name}_loss") for name in data.corpora)
        },
        probe=seen.to_dict() if seen else None,
        seconds=trainer.seconds,
        history=history,
    )
    whole = whole_parameters(trained) if trainer.is_fsdp_enabled else None
    if is_first_process():
        record = {"result": asdict(result), "config": _plain(asdict(config)), "run": checkpoints.run}
        save_run(trained, data.tokenizer, config.output, record, whole, checkpoints.all())
    trainer.accelerator.wait_for_everyone()
    return result


def _watch(input_ids: Tensor, control: Path | None) -> StreamWatch:
    """Without the control where several processes would each hold the whole of it."""
    if control is None or processes() > 1:
        return StreamWatch(input_ids)
    return StreamWatch(input_ids, on_accelerator(load_model(control)))


def _arguments(config: TrainConfig, steps: int, starting: bool, make: Callable[..., Any]) -> Any:
    on_gpu = torch.cuda.is_available()
    made = make(
        output_dir=str(config.output),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.gradient_clip,
        **schedule(config, steps),
        metric_for_best_model=None if config.patience is None else "eval_loss_smooth",
        greater_is_better=False,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        eval_on_start=starting,
        eval_strategy="steps",
        eval_steps=-(-steps // config.evaluations),
        logging_steps=max(1, steps // 40),
        save_strategy="no" if config.save_every is None else "steps",
        save_steps=config.save_every or 500,
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to=config.report_to,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=on_gpu,
        # some of the streams' parameters get no gradient then; DDP would wait for them
        ddp_find_unused_parameters=True if _leaves_unused(config) else None,
    )
    # without a launcher the Trainer would take all GPUs, by nn.DataParallel: a larger batch, and no split of streams
    made._n_gpu = min(1, made.n_gpu)
    return made


def _leaves_unused(config: TrainConfig) -> bool:
    """Whether a step may leave parameters out: those of streams that do not run, or prefixes that a generator makes."""
    return config.balance.fewer_streams > 0 or config.streams.prefix_init == "reparameterized"


def _origin(config: TrainConfig, data: PackedText | None) -> tuple[PackedText, Any]:
    """The text of a run, and the model that it trains."""
    set_seed(config.seed)
    data = data or prepare(config)
    return data, model_of(config, data.tokenizer, sample(data.train, 4))


def _check_stopped(trainer: StreamsTrainer) -> None:
    """End here if the run was stopped before its last step."""
    if trainer.stopped_by is None:
        return
    newest = trainer.checkpoints.all()[-1]
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if trainer.stopped_by == DEADLINE:
        raise OutOfTime(f"stopped after step {step} of {steps}, saved in {newest}")
    if trainer.stopped_by == "SIGTERM":
        if trainer.is_world_process_zero():
            saved = f"stopped by SIGTERM after step {step} of {steps}, saved in {newest}"
            alone = f"resume with: {command_to_resume()}"
            say(f"{saved}; {alone if processes() == 1 else 'to go on, start it as before, with --resume'}")
        raise SystemExit(0)
    raise InputError(
        f"{trainer.stopped_by}; stopped, with the weights before them saved in {newest}. Lower the learning rates, or "
        "look at the text there"
    )


def _last(history: list[dict[str, Any]], key: str) -> float:
    return next(row[key] for row in reversed(history) if key in row)


def _streams(model: Any) -> int:
    return model.streams if has_streams(model) else 1


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values, default=str))
