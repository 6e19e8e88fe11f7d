"""A small model with a tokenizer on disk, and `parscale serve` in a process of its own."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.small import build, uncached, with_streams

KEY = "sk-a-secret"
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEMPLATED = "<system>Be brief.\n<user>Hé?\n<assistant>"
"""What the template makes of `CHAT`."""
CHAT: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hé"}, {"type": "text", "text": "?"}]},
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that characters may come in parts; 256 is the end, 257 padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def small_model(**config: Any) -> Any:
    """Four streams over the byte tokenizer's vocabulary."""
    return with_streams(build(vocab_size=258, max_position_embeddings=2048, **config))


def save(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def offline(model: Any, tokenizer: Any, prompt: str, new: int, streams: int) -> str:
    """Greedy decoding by definition: no cache, no batch, no server."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = uncached(model.with_streams(streams), ids, new)[0, ids.shape[1] :].tolist()
    return tokenizer.decode(made[: made.index(256)] if 256 in made else made, skip_special_tokens=True)


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], model: str, base: str) -> None:
        self.process, self.model, self.base = process, model, base
        self.http = httpx.Client(base_url=base, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)

    def client(self, **options: Any) -> Any:
        """OpenAI's own client."""
        from openai import OpenAI

        return OpenAI(**{"base_url": f"{self.base}/v1", "api_key": KEY, "max_retries": 0, "timeout": 60} | options)

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value, summed over the rows that have these labels."""
        text = self.http.get("/metrics").text
        rows = [line.rsplit(" ", 1) for line in text.splitlines() if re.match(rf"{name}[{{ ]", line)]
        return sum(float(value) for row, value in rows if all(f'{k}="{v}"' in row for k, v in labels.items()))

    def stop(self) -> tuple[int, str]:
        """SIGTERM; the exit code and what stood on stderr."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120), self.process.stderr.read() if self.process.stderr else ""


@contextlib.contextmanager
def serving(folder: Path, *arguments: object, key: str | None = KEY) -> Iterator[Server]:
    """`parscale serve folder` on a free port; it is killed at the end if it still runs."""
    command = [sys.executable, "-m", "parscale", "serve", folder, "--port", 0, *arguments]
    command += [] if key is None else ["--api-key", key]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            told = re.search(r"at (http://\S+)/v1", process.stdout.readline())
            assert told, process.stderr.read()
            server = Server(process, str(folder), told[1])
            with server.http:
                yield server
        finally:
            process.kill()


def until(condition: Any, tries: int = 1000) -> bool:
    """Ask the server again and again, each answer taking its time, until the condition holds."""
    return any(condition() for _ in range(tries))


@torch.no_grad()
def tokens_for(seed: int, length: int) -> list[int]:
    """Random bytes."""
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
