"""Prepare batches in a background thread while the device computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, Queue
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """Marks the end of the items."""

    error: BaseException | None = None


def prefetch(items: Iterator[T], num_ahead: int) -> Iterator[T]:
    """Iterate over the same items in the same order, with up to `num_ahead` of them prepared in advance.

    A thread prepares them, from the first request to the last item. An exception in it is raised here, in place of the
    item. If this iterator is closed early, the thread ends after its current item. Nothing waits for that: the item may
    never come, if it depends on other processes that have stopped, too.

    Args:
        items: must not be used elsewhere from now on.
        num_ahead: 1 or more; the thread itself may hold one more.
    """
    ready: Queue[T | _End] = Queue(num_ahead)
    is_closed = threading.Event()

    def prepare() -> None:
        end = _End()
        try:
            for item in items:
                ready.put(item)
                if is_closed.is_set():
                    return
        except BaseException as error:  # raised in the other thread, whatever it is
            end = _End(error)
        ready.put(end)

    threading.Thread(target=prepare, name="prefetch", daemon=True).start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        is_closed.set()
        # Make room for the one item that the thread may still put before it sees that it must end.
        while not ready.empty():
            try:
                ready.get_nowait()
            except Empty:
                break
