"""Ray Train's trainer, which this process can end. Not in `ray_compat`, because it imports torch."""

from __future__ import annotations

from typing import Any

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer

from agr_ray.runtime.ray_compat import abort_training


class InterruptibleTrainer(TorchTrainer):
    """A trainer whose `fit` raises KeyboardInterrupt on SIGINT, as Python does.

    Ray's own waits until the controller has stopped, which takes half a minute on a busy machine, or forever while the
    controller waits for nodes. Then it exits with status 1 and no message.
    """

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        """Install no handler, but keep the controller, an actor."""
        self._controller = controller

    def end(self) -> None:
        """Kill the controller: `fit` raises RayActorError. Not by a signal, which may be ignored or blocked here."""
        if self._controller is not None:
            ray.kill(self._controller)

    def fit(self) -> Result:
        """Train to the end. On KeyboardInterrupt, ask the controller to stop, for it may outlive this process."""
        try:
            return super().fit()
        except KeyboardInterrupt:
            if self._controller is not None:
                abort_training(self._controller)
            raise
