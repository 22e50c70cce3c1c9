"""Ray Train's trainer, which this process can end. Not in `ray_compat`, because it imports torch."""

from __future__ import annotations

import dataclasses
import time
from contextlib import suppress
from typing import Any, Final

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer

from agr_ray.json_log import print_at_once
from agr_ray.runtime.ray_compat import abort_training, has_flag, set_flag

ANSWER_TIMEOUT_S: Final = 8.0
"""For the workers to begin the last checkpoint. They look every five seconds, if they train."""
SAVE_TIMEOUT_S: Final = 17.0
"""For the checkpoint to be in storage. With `ANSWER_TIMEOUT_S`, less than the 30 s that Kubernetes grants."""
_LOOK_EVERY_S: Final = 0.2


@dataclasses.dataclass(frozen=True)
class StopRequest:
    """The driver's request that the workers save a checkpoint, because it is about to stop them, and their answers."""

    name: str
    """Of the driver's run, and of no other."""

    def make(self) -> bool:
        """Make the request, wait for a limited time, and return whether the checkpoint is saved. For the driver."""
        set_flag(f"{self.name}/stop")
        return _wait_for(f"{self.name}/saving", ANSWER_TIMEOUT_S) and _wait_for(f"{self.name}/saved", SAVE_TIMEOUT_S)

    def is_made(self) -> bool:
        """Return whether the workers must save a checkpoint; if so, tell the driver to wait. Called by one worker."""
        if not has_flag(f"{self.name}/stop"):
            return False
        set_flag(f"{self.name}/saving")
        return True

    def is_met(self) -> None:
        """Tell the driver that the checkpoint is saved. Called by one worker."""
        set_flag(f"{self.name}/saved")


def _wait_for(flag: str, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not has_flag(flag):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


class InterruptibleTrainer(TorchTrainer):
    """A trainer whose `fit` raises KeyboardInterrupt on SIGINT, as Python does, after a last checkpoint.

    Ray's own waits until the controller has stopped, which takes half a minute on a busy machine, or forever while the
    controller waits for nodes. Then it exits with status 1 and no message.

    Args:
        stop_request: to the workers.
        arguments: of `TorchTrainer`.
        options: of `TorchTrainer`.
    """

    _controller: Any = None

    def __init__(self, *arguments: Any, stop_request: StopRequest, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._stop_request = stop_request

    def _register_sigint_handler(self, controller: Any) -> None:
        """Install no handler, but keep the controller, an actor."""
        self._controller = controller

    def end(self) -> None:
        """Kill the controller: `fit` raises RayActorError. Not by a signal, which may be ignored or blocked here."""
        if self._controller is not None:
            ray.kill(self._controller)

    def fit(self) -> Result:
        """Train to the end. On KeyboardInterrupt, let the workers save, and end the controller, which may outlive us.

        A second KeyboardInterrupt ends the wait.
        """
        try:
            return super().fit()
        except KeyboardInterrupt:
            if self._controller is not None:
                is_saved = False
                try:
                    print_at_once("saving a checkpoint; press Ctrl-C again to end at once")
                    with suppress(Exception):  # Ray's head may be unreachable; the interrupt must end this process
                        is_saved = self._stop_request.make()
                finally:
                    if not is_saved:  # between the steps of an epoch alone, the workers look for the request
                        print_at_once("no checkpoint was saved in time: the run resumes from the one before")
                    abort_training(self._controller)
            raise
