"""Runs a function in processes of its own, which may be killed, starved or joined by torch.distributed.

They are forked from a server that has imported what is slow to import and has done nothing else: a process in which
torch has run a backward pass cannot be forked.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["parscale.train.trainer", "tests.small", "tests.train.children"])


def run(function: Callable[..., Any], *args: Any, processes: int = 1, timeout: float = 240, **env: str) -> list[int]:
    """Exit codes of `processes` copies, told apart by RANK; a signal's number is negative. `env` is set in each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = {name: str(value) for name, value in launched.items()} if processes > 1 else {}
        started.append(_SERVER.Process(target=_child, args=(function, args, own | env)))
        started[-1].start()
    for process in started:
        process.join(timeout)
        if process.is_alive():
            for one in started:
                one.kill()
            raise TimeoutError(f"{function.__name__} took more than {timeout} s")
    return [process.exitcode for process in started]


def _child(function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str]) -> None:
    os.environ.update(env)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    function(*args)
