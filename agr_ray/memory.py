"""How a worker process keeps its memory."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_KEPT_BYTES = 2**30


def keep_freed_memory() -> None:
    """Have up to 1 GiB of freed memory kept for the next batch instead of given back; only glibc can.

    A batch of photographs and a network's maps are large blocks, which glibc else maps anew each time: some 3,000 page
    faults a photograph.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
