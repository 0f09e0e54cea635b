# SPDX-License-Identifier: GPL-3.0-or-later
"""A slow way to a node: a TCP relay on loopback that holds back what passes, each way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_CHUNK_BYTES = 65536


@contextmanager
def slow_link(address: str, port: int, delay_seconds: float) -> Iterator[int]:
    """Relay connections to *address*; give the port on 127.0.0.1 to connect to."""
    loop = asyncio.new_event_loop()
    relay = _Relay(address, port, delay_seconds)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(relay.start(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(relay.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


class _Relay:
    def __init__(self, address: str, port: int, delay_seconds: float) -> None:
        self._address = address
        self._port = port
        self._delay_seconds = delay_seconds
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.sleep(self._delay_seconds)
        with suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(self._address, self._port)
            await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Pass on each piece when its time has come; those behind it wait meanwhile, and come no later."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not data:
                    sink.close()
                    return
                sink.write(data)
                await sink.drain()

        delivering = asyncio.create_task(deliver())
        try:
            while data := await source.read(_CHUNK_BYTES):
                waiting.put_nowait((loop.time() + self._delay_seconds, data))
        except OSError:
            data = b""
        finally:
            waiting.put_nowait((loop.time() + self._delay_seconds, b""))
            with suppress(OSError):
                await delivering
