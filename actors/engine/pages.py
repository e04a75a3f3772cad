"""Which pages are free, in use or kept for reuse. Bookkeeping of numbers only; the tensors are `cache.PageStore`'s.

A page holds the keys and values of one whole block. A page of a finished block may be *published* under (what stands
before it, its tokens); a later request with the same tokens at the same place shares it. What stands before is named by
the node of the parent page, a number that is never given twice, so equal keys mean equal text from position 0 on:
nothing is hashed down to something that could collide. The first parent is the root, which carries whatever else decides
the values (weight version, adapter).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import count

Key = tuple[Hashable, tuple[int, ...]]


class PagePool:
    """Pages 0 to num_pages - 1, each free, in use (by one sequence or more) or kept (published, used by nobody).

    Args:
        reuse: whether pages may be published; without it `find` finds nothing.
    """

    def __init__(self, num_pages: int, reuse: bool = True) -> None:
        self.num_pages, self.reuse = num_pages, reuse
        self.hits = self.misses = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[Key, int] = {}
        self._published: dict[int, tuple[Key, int]] = {}  # page -> (key, node)
        self._nodes = count()

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_kept(self) -> int:
        """Pages that hold a published block which no sequence uses; they are given out when the free ones are gone."""
        return len(self._kept)

    def take(self) -> int | None:
        """A page for one user: a free one, else the one kept longest without use; None if all are in use."""
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            self._withdraw(page)
        else:
            return None
        self._users[page] = 1
        return page

    def find(self, parent: Hashable, tokens: tuple[int, ...]) -> tuple[int, Hashable] | None:
        """The page published under this key, now with one more user, and its node."""
        if not self.reuse:
            return None
        page = self._page_of.get((parent, tokens))
        if page is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.pop(page, None)
        self._users[page] += 1
        return page, self._published[page][1]

    def publish(self, page: int, parent: Hashable, tokens: tuple[int, ...]) -> Hashable:
        """Offer a page in use to others; returns its node, the parent of the block behind it."""
        key = (parent, tokens)
        if key in self._page_of:
            return self._published[self._page_of[key]][1]
        node = next(self._nodes)
        if self.reuse:
            self._page_of[key] = page
            self._published[page] = (key, node)
        return node

    def release(self, pages: Sequence[int]) -> None:
        """One user less for each page of a sequence, given in the order of its text.

        The last block is let go first, so that it is evicted before the blocks it stands on: without them it could
        never be found.
        """
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._published:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def withdraw(self, pages: Sequence[int]) -> None:
        """Publish these pages no longer, as when their values turned out to be unusable."""
        for page in pages:
            if page in self._published:
                self._withdraw(page)
                if page in self._kept:
                    del self._kept[page]
                    self._free.append(page)

    def unused(self, pages: Sequence[int]) -> list[int]:
        """Those of these pages that nobody uses."""
        return [page for page in pages if not self._users[page]]

    def forget(self) -> None:
        """Publish nothing any more, as when weights change."""
        self.withdraw(list(self._published))

    def _withdraw(self, page: int) -> None:
        key, _ = self._published.pop(page)
        del self._page_of[key]
