"""Batches made ahead, in a thread, while the device computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, Queue
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """Comes after the last item."""

    error: BaseException | None = None


def prefetch(items: Iterator[T], num_ahead: int) -> Iterator[T]:
    """Iterate over the same items in the same order, of which up to `num_ahead` wait to be taken.

    A thread makes them: it starts with the first item that is asked for, and ends with the last. An exception in it is
    raised here, in its place in the order. Closed early, the thread ends after the item that it is at. Nobody waits for
    it: that item may never come, where it comes from others who have stopped too.

    Args:
        items: used by no one else from now on.
        num_ahead: 1 or more; the thread may hold one more, just made.
    """
    ready: Queue[T | _End] = Queue(num_ahead)
    is_closed = threading.Event()

    def make() -> None:
        end = _End()
        try:
            for item in items:
                ready.put(item)
                if is_closed.is_set():
                    return
        except BaseException as error:  # handed on, whatever it is
            end = _End(error)
        ready.put(end)

    threading.Thread(target=make, name="prefetch", daemon=True).start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        is_closed.set()
        # Room for the one item that the thread may be about to put down before it sees that it is to end.
        while not ready.empty():
            try:
                ready.get_nowait()
            except Empty:
                break
