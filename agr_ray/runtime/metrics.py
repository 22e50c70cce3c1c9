"""Progress as Prometheus metrics. Ray collects them from all processes, and each node serves its own to Prometheus.

The jobs' progress events arrive here, and nothing is counted twice. Ray puts `ray_` before each name. It drops a gauge
that has not been set for 20 seconds, so a thread sets those of this process again, until they are no longer true.

Jobs that need no cluster, such as the scoring of a few photographs, have no metrics.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from time import time
from typing import Any, Final, NamedTuple

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from agr_ray.learn.progress import Progress
from agr_ray.redact import redacted

EXPORTED: Final = "ray_"
"""Ray's prefix of the names that Prometheus sees."""
COMMON_LABELS: Final = ("command", "output")
"""Labels of all our metrics: the command, and the folder or prefix that it writes."""
REFRESH_S: Final = 5.0
_SECONDS: Final = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
"""Upper limits of the histograms' buckets."""


class Definition(NamedTuple):
    """What a metric is."""

    kind: type[Counter | Gauge | Histogram]
    description: str
    labels: tuple[str, ...] = ()
    """Besides `COMMON_LABELS`."""


DEFINITIONS: Final[Mapping[str, Definition]] = {
    "agr_ray_images_total": Definition(Counter, "Images of finished parts, by status", ("status",)),
    "agr_ray_faces_total": Definition(Counter, "Faces found in scored images"),
    "agr_ray_image_stage_seconds": Definition(
        Histogram, "Time of a worker for one image in a stage: the mean of a finished part", ("stage",)
    ),
    "agr_ray_parts": Definition(
        Gauge, "Parts that are not finished: in_flight (at most one for each worker) or waiting", ("state",)
    ),
    "agr_ray_last_finished_timestamp_seconds": Definition(
        Gauge, "Time at which a job last found all photographs scored: it published them, or nothing was new"
    ),
    "agr_ray_last_published_timestamp_seconds": Definition(Gauge, "Time at which the last run was published"),
    "agr_ray_train_epoch": Definition(Gauge, "Epoch in progress, from 1"),
    "agr_ray_train_loss": Definition(Gauge, "Mean training loss of the first worker since the epoch began"),
    "agr_ray_train_loss_finite": Definition(Gauge, "1; 0 after a loss that is NaN or infinite, which ends the run"),
    "agr_ray_train_samples_per_second": Definition(Gauge, "Images of all workers per second since the epoch began"),
    "agr_ray_train_data_wait_ratio": Definition(Gauge, "Share of the epoch in which the first worker waits for data"),
    "agr_ray_train_progress_timestamp_seconds": Definition(Gauge, "Time of the last progress of training"),
    "agr_ray_validation_loss": Definition(Gauge, "Validation loss of the last epoch"),
    "agr_ray_validation_objective_ratio": Definition(
        Gauge, "Mean over the tasks of error / constant baseline's error in the last epoch"
    ),
    "agr_ray_validation_age_mae_years": Definition(Gauge, "Mean absolute error of age in the last epoch"),
    "agr_ray_validation_gender_accuracy_ratio": Definition(Gauge, "Accuracy of gender in the last epoch"),
    "agr_ray_validation_race_accuracy_ratio": Definition(Gauge, "Accuracy of race in the last epoch"),
}
_VALIDATION: Final = {
    "agr_ray_validation_loss": "val_loss",
    "agr_ray_validation_objective_ratio": "val_objective",
    "agr_ray_validation_age_mae_years": "val_age_mae_years",
    "agr_ray_validation_gender_accuracy_ratio": "val_gender_accuracy",
    "agr_ray_validation_race_accuracy_ratio": "val_race_accuracy",
}
"""The column of `schema.HISTORY` that each gauge shows."""


@cache
def _metric(name: str) -> Any:
    """Return a metric of this process, made on first use."""
    definition = DEFINITIONS[name]
    more = {"boundaries": _SECONDS} if definition.kind is Histogram else {}
    return definition.kind(name, definition.description, tag_keys=(*COMMON_LABELS, *definition.labels), **more)


class Metrics:
    """The metrics of one job in this process, which is connected to a cluster.

    Args:
        command: of `agr-ray`.
        output: URI that the job writes to.
    """

    def __init__(self, command: str, output: str) -> None:
        self._labels = {"command": command, "output": redacted(output)}
        self._gauges: dict[tuple[str, str], tuple[dict[str, str], float]] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._keep_gauges, name="metrics", daemon=True)

    @contextmanager
    def kept(self) -> Iterator[Metrics]:
        """Keep the gauges until the block ends."""
        self._thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            self._thread.join()

    def _keep_gauges(self) -> None:
        while not self._is_over.wait(REFRESH_S) and ray.is_initialized():
            for (name, _), (labels, value) in list(self._gauges.items()):
                _metric(name).set(value, labels)

    def _set(self, name: str, value: float | None, state: str = "") -> None:
        if value is None or not math.isfinite(value):  # Ray passes on only finite values
            return
        labels = self._labels | ({"state": state} if state else {})
        self._gauges[name, state] = labels, value
        _metric(name).set(value, labels)

    # Parts of images

    def parts_left(self, number: int, num_workers: int) -> None:
        """Show how many parts are not finished."""
        self._set("agr_ray_parts", min(number, num_workers), "in_flight")
        self._set("agr_ray_parts", max(number - num_workers, 0), "waiting")

    def images(self, statuses: Mapping[str, int]) -> None:
        """Count the images of a finished part."""
        for status, number in statuses.items():
            _metric("agr_ray_images_total").inc(number, self._labels | {"status": status})

    def scored(self, summary: Mapping[str, Any], *, hides_totals: bool) -> None:
        """Count a part that was scored.

        Args:
            summary: a row of `scorer.SUMMARY`.
            hides_totals: whether images and faces are not counted, because a suppressed cell could be computed from
                their numbers.
        """
        num_images = sum(summary["statuses"].values())
        for stage, seconds in summary["worker_s"].items():
            _metric("agr_ray_image_stage_seconds").observe(seconds / num_images, self._labels | {"stage": stage})
        if not hides_totals:
            self.images(summary["statuses"])
            if summary["num_faces"]:
                _metric("agr_ray_faces_total").inc(summary["num_faces"], self._labels)

    def finished(self, record: Mapping[str, Any]) -> None:
        """Note that all photographs are scored, and the record of the run that was published last."""
        self._set("agr_ray_last_finished_timestamp_seconds", time())
        self._set(
            "agr_ray_last_published_timestamp_seconds", datetime.fromisoformat(record["published_at"]).timestamp()
        )

    # Training

    def training_begins(self) -> None:
        """Note that the workers have started."""
        self._set("agr_ray_train_progress_timestamp_seconds", time())

    def training(self, progress: Progress) -> None:
        """Show the progress of an epoch."""
        self._set("agr_ray_train_epoch", progress.epoch)
        self._set("agr_ray_train_loss", progress.loss)
        self._set("agr_ray_train_loss_finite", 1.0)
        self._set("agr_ray_train_samples_per_second", progress.samples_per_s)
        self._set("agr_ray_train_data_wait_ratio", progress.data_wait_share)
        self._set("agr_ray_train_progress_timestamp_seconds", time())

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Show the results of an epoch: a row of `schema.HISTORY`."""
        for name, column in _VALIDATION.items():
            self._set(name, row[column])
        self._set("agr_ray_train_progress_timestamp_seconds", time())

    def not_finite(self) -> None:
        """Show that the run ended because its loss was not finite."""
        self._set("agr_ray_train_loss_finite", 0.0)
