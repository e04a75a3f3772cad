"""How much memory a job and everything it started hold at most."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import Self

import psutil

_INTERVAL_S = 1.0


class MemoryWatch:
    """Samples the proportional set size of this process and all its descendants once a second.

    Proportional, because Ray's workers share most of their pages: the plain sum of resident sizes would count
    the same torch library once per process.

    Attributes:
        peak_bytes: the largest sum seen.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, self._sum())

    @staticmethod
    def _sum() -> int:
        own = psutil.Process()
        total = 0
        for process in [own, *own.children(recursive=True)]:
            # Workers come and go between the listing and the look.
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
