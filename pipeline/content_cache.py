"""A cache as the pipeline means it: key, value, bound, and counts that anyone can look at.

The key is built by the code that computes the value, from everything that changes it; the cache asks no questions. What it
holds is bounded by number, oldest use first out, so that a camera whose pictures never come back costs a known amount.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch


class ContentCache:
    """A bounded mapping, least recently used out first, counted. Values are tensors, or tuples that hold some."""

    def __init__(self, max_entries: int):
        self.max_entries = max_entries
        self.hits = self.misses = self.bytes = 0
        self._entries: OrderedDict = OrderedDict()

    def __contains__(self, key) -> bool:
        return key in self._entries

    def get(self, key, make: Callable[[], Any]) -> Any:
        """The value under `key`; `make()` computes it if it is not here. Callers must not change what they get."""
        if key in self._entries:
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key]
        self.misses += 1
        value = make()
        self._entries[key] = value
        self.bytes += _nbytes(value)
        while len(self._entries) > self.max_entries:
            _, old = self._entries.popitem(last=False)
            self.bytes -= _nbytes(old)
        return value

    def clear(self) -> None:
        """Empties the cache and sets its counts to zero."""
        self._entries.clear()
        self.hits = self.misses = self.bytes = 0

    def summary(self) -> dict[str, int]:
        """entries, bytes, hits, misses. Plain numbers: may be asked from any thread."""
        return {"entries": len(self._entries), "bytes": self.bytes, "hits": self.hits, "misses": self.misses}


def _nbytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_nbytes, value)) if isinstance(value, (list, tuple)) else 0
