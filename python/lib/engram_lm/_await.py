"""Waiting for rows in an event loop."""

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engram_lm._core import Ticket


async def rows_of(ticket: "Ticket") -> "memoryview[float]":
    """The ticket's rows as float32. The loop is told from another thread and never blocked while they are fetched."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    def call() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(tell)

    ticket._when_ready(call)
    await ready
    rows: memoryview[float] = ticket.take()
    return rows
