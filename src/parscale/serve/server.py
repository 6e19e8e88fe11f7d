"""`parscale serve`: a model loaded, a socket bound, and uvicorn run until it is told to stop.

On SIGTERM or Ctrl-C uvicorn takes no new connection and waits until the answers under way are finished.
"""

import gc
import os
import signal
import socket
import sys
from contextlib import closing
from typing import Literal

import torch

from parscale.errors import InputError
from parscale.load import load_model, load_tokenizer
from parscale.serve.engine import Engine
from parscale.serve.limits import Limits

KEY = "PARSCALE_API_KEY"
"""The environment variable that holds the API key. A key on the command line is seen by everyone on the machine."""

LOCAL = ("127.0.0.1", "::1", "localhost")
OWN_NAMES = ("127.0.0.1", "[::1]", "localhost")
"""`LOCAL` as the `Host` of a request has them."""


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    streams: int | None = None,
    api_key: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> None:
    """Serve a model under OpenAI's interface; returns when the server has been stopped.

    Args:
        model: a folder or a hub name, with or without streams; safetensors only, no remote code.
        host: the address to listen on.
        port: 0 takes a free one. The first line printed tells it.
        streams: p of requests that name none; by default all.
        api_key: by default what the environment variable PARSCALE_API_KEY holds; without any, everyone may ask.
        dtype: of the weights; auto is the checkpoint's.
        limits: see `Limits`.

    Raises:
        InputError: the extra `serve` is not installed, the address is taken, or the model cannot be served.
    """
    try:
        import uvicorn

        from parscale.serve.connection import PacedHTTP
        from parscale.serve.openai import build_app
        from parscale.serve.tokenizing import Tokenizing
    except ImportError as error:
        raise InputError(f"serving needs packages: pip install 'parscale[serve]' ({error})") from None
    api_key = api_key or os.environ.get(KEY) or None
    model = model.rstrip("/") or model
    with _listen(host, port) as listening:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded, tokenizer = load_model(model, dtype=dtype).to(device), load_tokenizer(model)
        if len(tokenizer) > loaded.get_input_embeddings().num_embeddings:
            raise InputError(f"model {model!r}: its tokenizer has more tokens than the model has embeddings")
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        with (
            closing(Engine(loaded, tokenizer, limits, streams)) as engine,
            closing(Tokenizing(tokenizer, limits.max_prompt_seconds)) as tokenizing,
        ):

            def ready() -> None:
                print(
                    f"parscale: serving {model} with streams={engine.streams} of {engine.trained} at {address}/v1",
                    flush=True,
                )
                if host not in LOCAL and api_key is None:
                    print(f"parscale: {host} can be reached by others; {KEY} is not set", file=sys.stderr, flush=True)

            engine.open(engine.streams)
            tokenizing.open()
            # A web page whose name is made to point at this machine would be allowed to ask, and to read the answers.
            hosts = OWN_NAMES if host in LOCAL and api_key is None else ("*",)
            app = build_app(engine, tokenizing, model, api_key, ready, hosts)
            config = uvicorn.Config(app, http=PacedHTTP, ws="none", log_level="warning", access_log=False)
            # The libraries' million objects never die; each collection that visits them takes half a second.
            gc.freeze()
            # uvicorn raises the signal anew when it has stopped: then it must not kill what is left to do.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise InputError(f"port={port} is not accepted; give 0 to 65535")
    try:
        made = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise InputError(f"host={host!r}, port={port}: cannot listen there ({error})") from None
    # asyncio sets TCP_NODELAY only where a socket names its protocol. Without it every answer waits 40 ms for an ACK.
    return socket.socket(made.family, made.type, socket.IPPROTO_TCP, fileno=made.detach())
