"""Several engine streams as one, and events on the wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

from fewstep.actors.engine.request import Update

DONE = b"data: [DONE]\n\n"


def event(json_text: str) -> bytes:
    """One server-sent event; JSON holds no line breaks, so one `data:` line carries it."""
    return f"data: {json_text}\n\n".encode()


def event_of(value: Mapping[str, Any]) -> bytes:
    """One event with a JSON object."""
    return event(json.dumps(value, ensure_ascii=False))


async def merge(streams: Sequence[AsyncIterator[Update]]) -> AsyncGenerator[tuple[int, Update]]:
    """Updates of all streams in the order they come, each with its stream's index.

    All streams run at once. Closing this generator, or a failure of one stream, cancels the others, which
    aborts their requests.
    """
    queue: asyncio.Queue[tuple[int, Update | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[Update]) -> None:
        try:
            async for update in stream:
                queue.put_nowait((index, update))
        finally:
            queue.put_nowait((index, None))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            index, update = await queue.get()
            if update is None:
                await tasks[index]  # raises what ended it
                left -= 1
            else:
                yield index, update
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
