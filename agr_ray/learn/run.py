"""What a training run is: what its workers are told, and what it writes beside checkpoints.

The folder's layout is in `runtime.train`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa
from torch import Tensor

from agr_ray.config import TrainJob
from agr_ray.config.pipeline import Pipeline
from agr_ray.errors import ConfigError
from agr_ray.evaluation.metrics import Baseline
from agr_ray.learn.history import Row
from agr_ray.learn.sampling import Sampler
from agr_ray.learn.tracking import TrackedRun
from agr_ray.models.transform import Transform
from agr_ray.schema import HISTORY
from agr_ray.storage import Storage

CHECKPOINTS: Final = "checkpoints"
FAILURE: Final = "failure.txt"
OBJECTIVE: Final = "val_objective"
_SECTIONS: Final = ("labels", "model", "loss", "augment", "train", "predict")


@dataclasses.dataclass(frozen=True)
class Run:
    """What every worker is told."""

    job: TrainJob
    storage: Storage
    uri: str
    transform: Transform
    pipeline: Pipeline
    """The settings that its checkpoints store."""
    baseline: Baseline
    sampler: Sampler | None
    num_train_rows: int
    num_val_rows: int
    train_images: Tensor
    data: Mapping[str, Any]
    """What the checkpoint says of its data."""
    git_commit: str
    settings_digest: str
    quiet: bool = False
    """Whether workers print warnings only: of a sweep's trials, of which its driver says how they do."""


def settings(job: TrainJob) -> dict[str, Any]:
    """Return the settings that decide what the run learns, by section, without those of where it runs."""
    return job.model_dump(mode="json", include=set(_SECTIONS), exclude={"train": {"mlflow_uri"}})


def write_history(run: Run, history: list[Row]) -> None:
    """Write history.parquet."""
    table = pa.Table.from_pylist(history, schema=HISTORY)
    run.storage.write_table(table, run.storage.join(run.uri, "history.parquet"))


def tracked(run: Run) -> TrackedRun | None:
    """Return the run in MLflow, made there if need be; None where none is asked for."""
    uri = run.job.train.mlflow_uri
    return TrackedRun(uri, run.uri, settings(run.job)) if uri else None


def tracked_again(run: Run) -> tuple[TrackedRun | None, str]:
    """Do what `tracked` does once training has begun, when an unreachable server is only a warning."""
    try:
        return tracked(run), ""
    except ConfigError as error:
        return None, str(error)
