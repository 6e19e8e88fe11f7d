"""Parallel streams for any Hugging Face causal language model (arXiv 2505.10475)."""

from parscale import law
from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.load import load_model as load
from parscale.load import load_tokenizer
from parscale.probe import probe_streams
from parscale.streams.adaptive import HardTokens
from parscale.streams.checkpoint import load_streams, save_streams, use_streams
from parscale.streams.families import register_family
from parscale.streams.hub import push_to_hub
from parscale.streams.merge_first import merge_first
from parscale.streams.parallelize import parallelize

__version__ = "0.1.0"

__all__ = [
    "HardTokens",
    "InputError",
    "StreamsConfig",
    "law",
    "load",
    "load_streams",
    "load_tokenizer",
    "merge_first",
    "parallelize",
    "probe_streams",
    "push_to_hub",
    "register_family",
    "save_streams",
    "use_streams",
]
