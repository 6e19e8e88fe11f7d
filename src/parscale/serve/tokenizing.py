"""Tokenising and chat templates in processes of their own (tokenizer_child.py), a few at a time."""

import asyncio
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import from_json, to_json

from parscale.errors import InputError
from parscale.serve.tokenizer_child import SIZE

LONG = 8192
"""Bytes from which on a request does not stand in one line with shorter ones."""

LANES = {"text": 2, "chat": 2, "long": 1}
"""How many requests of each kind are worked on at once. A chat that runs into its time limit holds up no text."""


class Ended(Exception):
    """A request that took too long or too much memory; its process was ended."""


class TokenizerGone(RuntimeError):
    """The process that holds the tokenizer has died; no request can be read any more."""


class Tokenizing:
    """Texts and chats in, tokens out. To be closed.

    Args:
        tokenizer: the model's.
        seconds: for one request.
    """

    def __init__(self, tokenizer: Any, seconds: float) -> None:
        self._control, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as held:
            pickle.dump(tokenizer, held)  # for a process of our own, as multiprocessing does
            held.seek(0)
            script = Path(__file__).with_name("tokenizer_child.py")
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script), str(theirs.fileno()), str(seconds)],
                stdin=held,
                pass_fds=[theirs.fileno()],
                # Threads of the tokenizer would not live on in the workers.
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"},
                start_new_session=True,  # Ctrl-C in a terminal ends the server, which ends this once all is answered
            )
        self._lanes = {name: ThreadPoolExecutor(count, f"tokenize-{name}") for name, count in LANES.items()}
        self._thread = threading.local()
        self._workers: set[socket.socket] = set()

    @property
    def alive(self) -> bool:
        """Whether requests can be read."""
        return self._process.poll() is None

    def open(self) -> None:
        """Wait until the process is up.

        Raises:
            InputError: it has died.
        """
        try:
            self._lanes["text"].submit(self._ask, to_json({"texts": []})).result()
        except (Ended, TokenizerGone):
            raise InputError("the tokenizer cannot be used in a process of its own; stderr says why") from None

    async def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        """See `tokenizer_child.tokenize`.

        Raises:
            Ended: it took too long, or too much memory.
            TokenizerGone: the process has died.
        """
        message = to_json(asked)
        lane = "long" if len(message) > LONG else "chat" if "chat" in asked else "text"
        return await asyncio.get_running_loop().run_in_executor(self._lanes[lane], self._ask, message)

    def close(self) -> None:
        """End the processes, also in the middle of a request."""
        for worker in list(self._workers):
            with suppress(OSError):
                worker.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
        for lane in self._lanes.values():
            lane.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._control.close()
        self._process.wait()

    def _ask(self, message: bytes) -> dict[str, Any]:
        """In a thread of a lane, which has a worker of its own."""
        worker = getattr(self._thread, "worker", None)
        try:
            worker = self._thread.worker = worker or self._new_worker()
            worker.sendall(SIZE.pack(len(message)) + message)
            return from_json(_read(worker, *SIZE.unpack(_read(worker, SIZE.size))))
        except OSError:
            self._thread.worker = None
            if worker is not None:
                self._workers.discard(worker)
                worker.close()
            if not self.alive:
                raise TokenizerGone("the process that tokenises has died") from None
            raise Ended from None

    def _new_worker(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self._workers.add(ours)
        with theirs:
            socket.send_fds(self._control, [b"w"], [theirs.fileno()])
        return ours


def _read(stream: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        if not (part := stream.recv(size - len(parts))):
            raise ConnectionError
        parts += part
    return bytes(parts)
