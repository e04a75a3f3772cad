"""Several engine streams as one, and events on the wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, cast

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
    if len(streams) == 1:
        # The usual case without a task and a queue in between: each hop takes time from the engine's thread.
        async with aclosing(cast(AsyncGenerator[Update], streams[0])) as only:
            async for update in only:
                yield 0, update
        return
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
            index, found = await queue.get()
            if found is None:
                await tasks[index]  # raises what ended it
                left -= 1
            else:
                yield index, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
