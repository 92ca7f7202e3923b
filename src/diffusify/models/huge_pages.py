"""Huge memory pages for weights that every forward pass reads."""

import ctypes
import sys
from collections.abc import Iterable
from threading import Thread
from typing import Any

_HUGE_PAGE = 2 << 20  # bytes
_MADV_COLLAPSE = 25


def use_huge_pages(ranges: Iterable[tuple[int, int]]) -> None:
    """Move memory to huge pages, in a background thread; `ranges` are addresses and sizes in bytes.

    Small pages cost a product with large weights up to a fifth of its time in address lookups. Only Linux 6.1 or newer
    does this, and only in its default setting, where programs have to ask for huge pages. Elsewhere nothing changes.
    """
    if sys.platform == "linux":
        Thread(target=_collapse, args=(_whole_pages(ranges),), daemon=True).start()


def _whole_pages(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first and last addresses of ranges of whole huge pages; touching ranges are merged."""
    merged: list[tuple[int, int]] = []
    for address, size in sorted(ranges):
        start, end = address // _HUGE_PAGE * _HUGE_PAGE, -(-(address + size) // _HUGE_PAGE) * _HUGE_PAGE
        if merged and start <= merged[-1][1]:
            start, end = merged[-1][0], max(end, merged.pop()[1])
        merged.append((start, end))
    return merged


def _collapse(pages: list[tuple[int, int]]) -> None:
    """Ask the kernel; memory that has been freed, or that cannot be moved, is left as it is."""
    madvise: Any = ctypes.CDLL(None).madvise
    for start, end in pages:
        for page in range(start, end, _HUGE_PAGE):
            madvise(ctypes.c_void_p(page), ctypes.c_size_t(_HUGE_PAGE), _MADV_COLLAPSE)
