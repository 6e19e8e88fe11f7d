"""One set of weights behind a server: a batching manager for every p that is asked for, and the limits of all of them.

A manager is transformers' own (docs/generate.md), with a paged cache and a thread of its own. The managers share the
weights (`with_streams`), so another p costs a cache and nothing else. All methods but `open` belong to the event loop.
"""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.utils import logger as batching_log

from parscale.errors import InputError, first_line
from parscale.generate import end_tokens
from parscale.serve.limits import Limits
from parscale.serve.sampling import Sampling, use_sampler
from parscale.streams.backbone import has_streams, streams_of

PAGE = 32
"""Tokens in a page of the cache."""

STEP = 512
"""At most so many tokens in one step: longer prompts are read in chunks, between other requests' tokens."""


class EngineDead(RuntimeError):
    """The thread of a manager has died; nothing will be answered at its p any more."""


class Engine:
    """Answers token ids with token ids.

    Args:
        model: with or without streams.
        tokenizer: the model's.
        limits: see `Limits`.
        streams: p of requests that name none; None for all.

    Raises:
        InputError: a p that the model has not, or layers whose keys and values cannot be paged.
    """

    def __init__(self, model: Any, tokenizer: Any, limits: Limits, streams: int | None = None) -> None:
        self.model, self.tokenizer, self.limits = model.eval(), tokenizer, limits
        self.trained = streams_of(model).streams
        self.streams = self.trained if streams is None else streams
        if not 1 <= self.streams <= self.trained:
            raise InputError(f"streams={streams} is not accepted; this model has {self.trained}")
        if not model.is_backend_compatible():
            raise InputError(f"{type(model).__name__} cannot be served: its attention does not go with a paged cache")
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context = min(limits.cache_tokens, positions or limits.cache_tokens)
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.ends = end_tokens(model, tokenizer)
        self.managers: dict[int, Any] = {}
        self.running = 0
        self._opening = asyncio.Lock()
        self._names = map(str, itertools.count())

    def open(self, streams: int) -> None:
        """Make the manager of one p, with its cache, and start its thread. Slow.

        Raises:
            InputError: layers whose keys and values cannot be paged, or a cache that does not fit.
        """
        model = self.model.with_streams(streams) if has_streams(self.model) else self.model
        settings = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=-(-self.limits.cache_tokens // PAGE) + 1,
            max_batch_tokens=max(STEP, self.limits.max_requests),
            max_requests_per_batch=self.limits.max_requests,
            # Graphs and double buffers would run ahead of the sampler; flash attention reads the cache past the prefix.
            use_cuda_graph=False,
            use_async_batching=False,
            auto_switch_to_flash=False,
        )
        try:
            manager = model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
                continuous_batching_config=settings,
            )
            use_sampler(manager)
            manager.warmup()
            manager.start()
        except InputError:
            raise
        except (ValueError, RuntimeError, AttributeError, NotImplementedError, MemoryError) as error:
            raise InputError(f"{type(model).__name__} cannot be served: {first_line(error)}") from None
        self.context = min(self.context, infer_max_single_request_tokens(manager.batch_processor.cache))
        self.managers[streams] = manager
        batching_log.disabled = True  # a model that fails here is refused in one line, not with a traceback before it
        try:
            manager.add_request([0], max_new_tokens=1)
            tried = manager.get_result()
        finally:
            batching_log.disabled = False
        if tried is None or tried.error is not None:
            self.managers.pop(streams).stop(block=True, hard_stop=True)
            raise InputError(
                f"{type(model).__name__} cannot be served: its first token failed ({tried and tried.error})"
            )

    async def manager(self, streams: int) -> Any:
        """The manager of one p, made when it is first asked for.

        Raises:
            EngineDead: its thread has died.
        """
        async with self._opening:
            if streams not in self.managers:
                await asyncio.to_thread(self.open, streams)
        self._check(streams)
        return self.managers[streams]

    def submit(
        self,
        streams: int,
        prompt: list[int],
        new_tokens: int,
        sampling: Sampling | None,
        each_token: bool,
        heard: Callable[[Any], None],
    ) -> Callable[[bool], None]:
        """Have one prompt answered by the manager of `streams`, which is there.

        Args:
            streams: p.
            prompt: token ids.
            new_tokens: at most so many.
            sampling: None for greedy.
            each_token: call `heard` after every token, not only at the end.
            heard: gets transformers' `GenerationOutput`; the last one says so or has an error.

        Returns:
            What frees the request's place, to be called once, with whether the request is finished or taken back.
        """
        self._check(streams)
        manager, name = self.managers[streams], next(self._names)
        manager.register_result_handler(name, heard)
        manager.add_request(
            prompt,
            request_id=name,
            max_new_tokens=new_tokens,
            streaming=each_token,
            eos_token_id=self.ends or -1,
            **({"sampling": sampling} if sampling else {}),
        )
        self.running += 1

        def leave(finished: bool) -> None:
            self.running -= 1
            if finished:
                return
            manager.cancel_request(name)
            router = manager.output_router
            with router._lock:
                router.result_handlers.pop(name, None)
            # Tokens of requests that nobody waits for go to a queue that nobody reads.
            while not router.output_queue.empty():
                router.output_queue.get_nowait()

        return leave

    def scheduled(self) -> int:
        """Requests that hold a place in a manager."""
        schedulers = [manager.batch_processor.scheduler for manager in self.managers.values()]
        return sum(len(one.active_requests) + len(one.waiting_requests) for one in schedulers)

    @property
    def alive(self) -> bool:
        """Whether every manager's thread runs."""
        return all(manager.is_running() for manager in self.managers.values())

    def close(self) -> None:
        """Stop the threads; requests still running fail."""
        while self.managers:
            self.managers.popitem()[1].stop(block=True, hard_stop=True)

    def _check(self, streams: int) -> None:
        manager = self.managers[streams]
        if not manager.is_running():
            raise EngineDead(f"the engine has stopped: {manager.background_thread_status.fatal_error}")
