"""Parallel streams for any Hugging Face causal language model (arXiv 2505.10475)."""

__version__ = "0.1.0"
