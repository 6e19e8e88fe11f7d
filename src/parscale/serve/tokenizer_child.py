"""The process in which chats become texts and texts become tokens, so that a request which does not end can be ended.

A chat template is a program that came with the model, and nothing inside Python can stop `{{ 10**(10**8) }}`: the
kernel can. This script holds the tokenizer and forks a worker for each socket that it is handed; a request that takes
too long kills its worker, and the next one costs a fork. It imports no torch, so it starts quickly and stays small.
"""

import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from typing import Any

MEMORY = 512 << 20
"""Bytes that a worker may take on top of what the tokenizer has."""

SIZE = struct.Struct("!I")
"""Before every message: its length in bytes."""


def tokenize(tokenizer: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The tokens of `texts`, or of a `chat` (a list of turns) by the model's template.

    Returns:
        `tokens`: a list for each text. Else `refused`: what the template has against the chat, in one line; or
        `bytes`: the length of a chat's text, where it is more than `most_bytes`.
    """
    if "texts" in asked:
        return {"tokens": [tokenizer(text)["input_ids"] for text in asked["texts"]]}
    chat = asked["chat"]
    try:
        # Most templates leave out the turns of a role that they do not know, without a word.
        if "developer" not in tokenizer.get_chat_template():
            chat = [turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in chat]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template may raise anything, down to ZeroDivisionError
        return {"refused": (str(error).splitlines() or [""])[0] or type(error).__name__}
    if (size := len(text.encode())) > asked["most_bytes"]:
        return {"bytes": size}
    return {"tokens": [tokenizer(text, add_special_tokens=False)["input_ids"]]}


def _answer(tokenizer: Any, stream: Any, seconds: float) -> None:
    """Answer one request after another until the server closes its end."""
    while head := stream.read(SIZE.size):
        asked = json.loads(stream.read(*SIZE.unpack(head)))
        signal.setitimer(signal.ITIMER_REAL, seconds)  # the kernel's SIGALRM ends the process, whatever it does
        made = json.dumps(tokenize(tokenizer, asked)).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        stream.write(SIZE.pack(len(made)) + made)
        stream.flush()


def _bound_memory() -> None:
    if sys.platform == "linux":  # elsewhere the kernel does not keep to it
        with open("/proc/self/statm") as sizes:  # noqa: PTH123 (pathlib is one import more)
            now = int(sizes.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def main() -> None:
    """Fork a worker for every socket that comes, until the server is gone."""
    control = socket.socket(fileno=int(sys.argv[1]))
    tokenizer = pickle.load(sys.stdin.buffer)  # of the server that started this; nobody else can write there
    # What is imported and compiled at the first request is so here, once, and not in every worker.
    tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template="x", tokenize=False))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers that end leave nothing behind
    while sockets := socket.recv_fds(control, 1, 1)[1]:
        worker = socket.socket(fileno=sockets[0])
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a server that has gone is no fault to be told
            _bound_memory()
            with worker.makefile("rwb") as stream:
                _answer(tokenizer, stream, float(sys.argv[2]))
            os._exit(0)
        worker.close()
    os._exit(0)


if __name__ == "__main__":
    main()
