"""A process that holds models of one code, this library or the released one, and runs the steps that it is told.

Started by generate.py under either interpreter: the released code wants a transformers older than this library's.
Reads a JSON request a line, {"case": …, "do": …, "arguments": […]}, and answers a line, {"seconds": …, "result": …}.
"""

import copy
import ctypes
import gc
import importlib
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from quantized import quantize
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

STREAMS, PREFIX = 8, 48


class Case:
    """One model at one P, and the KV cache of its last prompt."""

    def __init__(self, model: Any, streams: Any = None, keep: str = "logits_to_keep", batch: int = 1) -> None:
        self.model, self.streams, self.keep, self.batch = model, streams, {keep: 1}, batch
        self.cache: Any = None

    def prefill(self, tokens: int) -> None:
        """Run a prompt of so many random tokens into a new cache."""
        self._run(self._random_tokens(tokens), None)

    def decode(self) -> None:
        """Run one more token on the cache."""
        self._run(self._random_tokens(1), self.cache)

    def fill(self, context: int, static: bool) -> None:
        """A cache of random keys and values, as a prefill of that length would leave it after hours."""
        cache = None
        if static:
            from transformers import StaticCache  # that of the interpreter at hand

            cache = StaticCache(config=self.model.config, max_cache_len=context + 64)
        self._run(self._random_tokens(2), cache)
        rows = getattr(self.model, "cached_streams", self.streams or 1)  # the released code has a row for every stream
        heads = self.model.config.num_key_value_heads
        size = self.model.config.hidden_size // self.model.config.num_attention_heads
        for layer in range(self.model.config.num_hidden_layers):
            keys, values = torch.randn(2, rows, heads, context - 2, size, dtype=self.model.dtype)
            self.cache.update(keys, values, layer)

    def allocated(self) -> dict[str, float]:
        """MB that the operations of one decoded token make anew: all together, and the largest of them."""
        with Allocations() as seen:
            self.decode()
        return {"made_mb": sum(seen.made) / 1e6, "largest_mb": max(seen.made) / 1e6}

    def peak(self, prompt: int, new: int) -> dict[str, float]:
        """MB that this process holds before it continues a prompt and at most while it does, and what the cache is of
        that."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _held("VmRSS")
        self.prefill(prompt)
        for _ in range(new):
            self.decode()
        cache = cache_bytes(self.model.config, self.model.dtype, self.streams or 1, prompt + new)
        return {"peak_mb": _held("VmHWM"), "before_mb": before, "cache_mb": cache / 1e6}

    def _run(self, ids: Tensor, cache: Any) -> None:
        if hasattr(self.model, "set_streams"):
            self.model.set_streams(self.streams)
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self.keep)
        self.cache = output.past_key_values

    def _random_tokens(self, tokens: int) -> Tensor:
        return torch.randint(self.model.config.vocab_size, (self.batch, tokens))


class Allocations(TorchDispatchMode):
    """The bytes of every operation's output that is no view of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in held:
                self.made.append(tensor.nbytes)
        return out


def library(shape: dict[str, Any], weights: str, streams: list[int]) -> dict[str, Case]:
    """A plain model and one with streams over the same weights, not copied."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    import parscale

    plain = AutoModelForCausalLM.from_config(Qwen2Config(**shape), dtype=_dtype(weights)).eval()
    _quantize(plain, weights)
    shared = {id(tensor): tensor for tensor in [*plain.parameters(), *plain.buffers()]}
    streamed = copy.deepcopy(plain, shared)
    parscale.parallelize(streamed, parscale.StreamsConfig(streams=STREAMS, prefix_init="normal"))
    return {"plain": Case(plain)} | {f"P={p}": Case(streamed, p) for p in streams}


def released(shape: dict[str, Any], weights: str, streams: list[int], checkout: str) -> dict[str, Case]:
    """The released code's model at each P, over the same backbone weights. `checkout` holds its two files."""
    package = types.ModuleType("released")
    package.__path__ = [checkout]
    sys.modules["released"] = package
    config_class = importlib.import_module("released.configuration_qwen2_parscale").Qwen2ParScaleConfig
    model_class = importlib.import_module("released.modeling_qwen2_parscale").Qwen2ParScaleForCausalLM
    cases: dict[str, Case] = {}
    for p in streams:
        config = config_class(**shape, parscale_n=p, parscale_n_tokens=PREFIX)
        model = model_class._from_config(config, torch_dtype=_dtype(weights)).eval()
        for name, parameter in model.named_parameters():
            if "prefix_" in name:  # the released code leaves them uninitialised
                nn.init.normal_(parameter, std=0.02)
        if cases:
            backbone = next(iter(cases.values())).model.named_parameters(remove_duplicate=False)
            known = {k: v for k, v in backbone if "prefix_" not in k and "aggregate" not in k}
            model.load_state_dict(known, strict=False, assign=True)
        cases[f"P={p}"] = Case(model, p, keep="num_logits_to_keep")
    for case in cases.values():
        _quantize(case.model, weights)
    return cases


def bandwidth() -> float:
    """GB/s at which all threads together read memory: the best of ten matrix-vector products over 1 GB."""
    matrix, vector = torch.ones(2**14, 2**14), torch.ones(2**14)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        matrix @ vector
        best = min(best, time.perf_counter() - start)
    return matrix.nbytes / best / 1e9


def bytes_read(model: Any, streams: int | None, context: int) -> int:
    """What a decoded token must read: every weight once, the active streams' tensors, the cache of every stream. The
    model has `STREAMS` streams, or none."""
    p, read = streams or 1, 0.0
    for name, tensor in model.named_parameters():
        if "prefix_" in name or ("aggregate_layer" in name and p > 1):
            read += tensor.nbytes * p / STREAMS
        elif "aggregate_layer" not in name:
            read += tensor.nbytes
    return int(read) + cache_bytes(model.config, model.dtype, p, context)


def cache_bytes(config: Any, dtype: torch.dtype, streams: int, context: int) -> int:
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * width * context * streams * dtype.itemsize


def _dtype(weights: str) -> torch.dtype:
    return torch.float32 if weights == "float32" else torch.bfloat16


def _quantize(model: Any, weights: str) -> None:
    if weights in ("int8", "int4"):
        quantize(model.model.layers, int(weights.removeprefix("int")))


def _held(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kilobytes) * 1024 / 1e6


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.manual_seed(0)
    cases = (released if "checkout" in settings else library)(**settings)
    # As in `generate`. Under inference mode, or with weights that want no gradient, the LM head would copy its matrix.
    with torch.no_grad():
        tools = {"bandwidth": bandwidth, "floor": lambda name, t: bytes_read(cases[name].model, cases[name].streams, t)}
        print("ready", flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            run = tools[request["do"]] if request["case"] is None else getattr(cases[request["case"]], request["do"])
            start = time.perf_counter()
            result = run(*request["arguments"])
            print(json.dumps({"seconds": time.perf_counter() - start, "result": result}), flush=True)


if __name__ == "__main__":
    main()
