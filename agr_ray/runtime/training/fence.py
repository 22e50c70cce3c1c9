"""Keep a run whose lock was lost from writing: in its workers before each write, in Ray Train's controller all along.

The driver learns from its own heartbeats that it has lost the lock, but it is not the one that writes and deletes
checkpoints. So its other processes read the lock themselves.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from typing import Any, Final, Self

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import TrainRunContext

from agr_ray.runtime.lock import LockLost, RunLock
from agr_ray.storage import MissingObject, Storage, StorageError, StorageUnavailable

ABORT_S: Final = 10.0
"""Time for the controller to stop its workers in good order."""


@dataclasses.dataclass(frozen=True)
class Fence:
    """Says in any process whether the run's lock is still the driver's."""

    storage: Storage
    uri: str
    token: str
    heartbeat_s: float

    @classmethod
    def of(cls, lock: RunLock, storage: Storage) -> Self:
        """Return the fence of a lock that this process holds."""
        return cls(storage, lock.uri, lock.token, lock.heartbeat_s)

    def check(self) -> None:
        """Return only if the lock is still ours.

        Raises:
            LockLost: it is another run's, or gone.
            StorageError, StorageUnavailable: it can't be read; it may still be ours.
        """
        try:
            is_ours = self.token.encode() in self.storage.read(self.uri)
        except MissingObject:
            is_ours = False
        if not is_ours:
            raise LockLost(f"the lock {self.uri} is no longer ours; nothing more is written")


class StopWhenLost(ControllerCallback):
    """Stops the workers and the controller soon after the lock was lost, which ends the driver's `fit`."""

    def __init__(self, fence: Fence) -> None:
        self._fence = fence

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:  # noqa: ARG002  # Ray's signature
        """Begin to watch the lock."""
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
        controller.abort.remote()
        pause.wait(ABORT_S)
        os._exit(1)  # it is busy with something else; its workers end with it
