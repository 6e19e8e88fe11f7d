"""A sweep's runs as tasks of a Ray cluster (`--ray ADDRESS`, extra `cluster`), one for each GPU, or each CPU core where
there are none.

Rows are written by the process that asked. Paths mean the same on every node: the work folder and the texts lie on a
file system that all of them share.
"""

# pyright: reportMissingImports=false

import logging
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parscale.errors import InputError, first_line


@contextmanager
def ray_tasks(address: str, workers: int | None = None) -> Iterator[tuple[int, Callable[..., Future]]]:
    """How many tasks to have at once, and `submit(function, *arguments)`, which runs a function somewhere on the
    cluster, in the folder that this process is in. An error of a task is raised as itself.

    Args:
        address: `host:port` of a cluster, `auto` for the one that this machine belongs to, `local` for one that is
            started here and ends with the sweep.
        workers: tasks at once; by default as many as the cluster has GPUs, or else CPU cores.

    Raises:
        InputError: Ray is not installed, or no cluster answers at the address.
    """
    try:
        import ray
        from ray.exceptions import RayTaskError
    except ImportError:
        raise InputError(f"ray={address} needs Ray: pip install 'parscale[cluster]'") from None
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"ray={address}: no cluster answers there ({first_line(error)})") from None
    try:
        resources = ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        begin: Any = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_begin)
        here = Path.cwd()
        yield workers or gpus or cores, lambda function, *given: begin.remote(here, function, *given).future()
    except RayTaskError as error:
        raise error.cause from None
    finally:
        ray.shutdown()


def _begin(folder: Path, function: Callable[..., Any], *given: Any) -> Any:
    import torch

    os.chdir(folder)
    torch.set_num_threads(1)
    return function(*given)
