"""How bytes come in: uvicorn's HTTP protocol with small reads, paced where they come in bulk.

The event loop that parses requests also hands out every token. Whoever sends much may have a share of it, not all.
"""

import asyncio
import time

from uvicorn.protocols.http.h11_impl import H11Protocol

READ = 32 * 1024
"""Bytes of one read; a read that fills them is one of a bulk."""

COST = 0.0004
"""CPU seconds that reading so much and waking the application takes at least, beside what is measured."""

REST = 20
"""Seconds in which no bulk is read, for each CPU second of work on one."""

CREDIT = 1.0
"""Seconds of rest that are owed before anybody waits: a large request that comes alone is read at once."""


class Pace:
    """When bulks of one server are read again."""

    def __init__(self) -> None:
        self.free_at = 0.0

    def worked(self, seconds: float) -> float:
        """Count CPU seconds of work on a bulk; returns the seconds from now until more of it may be read."""
        now = time.monotonic()
        self.free_at = max(self.free_at, now - CREDIT) + REST * seconds
        return max(self.free_at - now, 0.0)


class PacedHTTP(H11Protocol, asyncio.BufferedProtocol):
    """`H11Protocol` that reads `READ` bytes at once, and pauses where they came in bulk.

    asyncio would read 256 KiB at once. In chunks of one byte, h11 takes most of a second for these.
    """

    pace = Pace()
    _buffer: bytearray

    def get_buffer(self, sizehint: int) -> bytearray:
        """Where the next read goes; kept no longer than that, for most connections are idle."""
        self._buffer = bytearray(READ)
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read."""
        start = time.thread_time()
        data, self._buffer = bytes(memoryview(self._buffer)[:nbytes]), bytearray()
        self.data_received(data)
        if nbytes == READ and not self.transport.is_closing():
            wait = self.pace.worked(COST + time.thread_time() - start)
            if wait > 0:
                self.transport.pause_reading()
                self.loop.call_later(wait, self._go_on)

    def _go_on(self) -> None:
        if not self.flow.read_paused and not self.transport.is_closing():  # else the application has enough for now
            self.transport.resume_reading()
