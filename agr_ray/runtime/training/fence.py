"""Stop a run from writing after it has lost its lock.

The driver notices a lost lock by its heartbeats, but other processes write and delete checkpoints. So these read the
lock themselves: the workers before each write, and Ray Train's controller all the time.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from typing import Any, Final, Self

import ray

from agr_ray.runtime.ray_compat import ControllerCallback, TrainRunContext, abort_training
from agr_ray.storage import MissingObject, Storage, StorageError, StorageUnavailable
from agr_ray.storage.lock import LockLost, RunLock

ABORT_S: Final = 10.0
"""Time for the controller to stop its workers cleanly."""


@dataclasses.dataclass(frozen=True)
class Fence:
    """Checks, in any process, whether the driver still holds the run's lock."""

    storage: Storage
    uri: str
    token: str
    heartbeat_s: float

    @classmethod
    def of(cls, lock: RunLock, storage: Storage) -> Self:
        """Return the fence of a lock that this process holds."""
        return cls(storage, lock.uri, lock.token, lock.heartbeat_s)

    def check(self) -> None:
        """Check that the driver still holds the lock.

        Raises:
            LockLost: another run holds the lock, or it is gone.
            StorageError, StorageUnavailable: the lock can't be read; the driver may still hold it.
        """
        try:
            is_ours = self.token.encode() in self.storage.read(self.uri)
        except MissingObject:
            is_ours = False
        if not is_ours:
            raise LockLost(f"the lock {self.uri} is no longer ours; nothing more is written")


class StopWhenLost(ControllerCallback):
    """Stops the workers and the controller soon after the lock is lost; this ends the driver's `fit`."""

    def __init__(self, fence: Fence) -> None:
        self._fence = fence

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:  # noqa: ARG002  # Ray's signature
        """Start watching the lock."""
        controller = ray.get_runtime_context().current_actor
        threading.Thread(target=self._watch, args=(controller,), name="fence", daemon=True).start()

    def _watch(self, controller: Any) -> None:
        pause = threading.Event()
        while not pause.wait(self._fence.heartbeat_s):
            try:
                self._fence.check()
            except (StorageError, StorageUnavailable):
                continue
            except LockLost:
                break
        abort_training(controller)
        pause.wait(ABORT_S)
        os._exit(1)  # the controller is blocked; its workers end with it
