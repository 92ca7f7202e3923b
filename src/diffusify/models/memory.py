"""The memory of weights on a CPU: weights from files, freed memory, and huge pages. Only Linux has all of this."""

import ctypes
import mmap
import sys
from collections.abc import Iterable
from threading import Thread
from typing import Any

from torch import nn

_HUGE_PAGE = 2 << 20  # bytes
_MADV_PAGEOUT, _MADV_COLLAPSE = 21, 25


def copy_from_files(network: nn.Module) -> None:
    """Copy weights that are parts of a mapped file, whose memory would stay in use as long as one of them does."""
    for parameter in network.parameters():
        if parameter.device.type == "cpu":
            old = parameter.data
            parameter.data = old.clone()
            start = -(-old.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (old.data_ptr() + old.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            _advise(start, end - start, _MADV_PAGEOUT)


def return_freed_memory() -> None:
    """Return freed memory to the system, which the allocator would keep."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # glibc
        library.malloc_trim(0)


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
    """Ask for huge pages; memory that has been freed, or that cannot be moved, is left as it is."""
    for start, end in pages:
        for page in range(start, end, _HUGE_PAGE):
            _advise(page, _HUGE_PAGE, _MADV_COLLAPSE)


def _advise(address: int, size: int, advice: int) -> None:
    """Tell the kernel how memory will be used. It may refuse; the contents stay the same either way."""
    if sys.platform == "linux" and size > 0:
        madvise: Any = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)
