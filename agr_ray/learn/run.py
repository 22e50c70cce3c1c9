"""A training run: what its workers need to know, and the files that it writes besides checkpoints.

`runtime.train` describes the layout of its folder.
"""

from __future__ import annotations

import dataclasses
import json
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
from agr_ray.storage import MissingObject, Storage

CHECKPOINTS: Final = "checkpoints"
FAILURE: Final = "failure.txt"
OBJECTIVE: Final = "val_objective"
OBJECTIVE_MEANING: Final = "objective: mean over the tasks of error / constant baseline's error; lower is better"
_SECTIONS: Final = ("labels", "model", "loss", "augment", "train", "predict")


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a worker needs to know of a run."""

    job: TrainJob
    storage: Storage
    uri: str
    transform: Transform
    pipeline: Pipeline
    """Settings that its checkpoints store."""
    baseline: Baseline
    sampler: Sampler | None
    num_train_rows: int
    num_val_rows: int
    train_images: Tensor
    data: Mapping[str, Any]
    """Description of the training data, stored in the checkpoints."""
    git_commit: str
    settings_digest: str
    quiet: bool = False
    """Whether workers print only warnings, as in a sweep, whose driver prints the progress of its trials."""


def settings(job: TrainJob) -> dict[str, Any]:
    """Return the settings of learning, by section: not those of storage and cluster, nor an address with a password."""
    return job.model_dump(mode="json", include=set(_SECTIONS), exclude={"train": {"mlflow_uri"}})


def is_finished(storage: Storage, uri: str) -> bool:
    """Return whether the run in this folder has finished; False if there is none."""
    try:
        return bool(json.loads(storage.read(storage.join(uri, "run.json")))["finished"])
    except MissingObject:
        return False


def write_history(run: Run, history: list[Row]) -> None:
    """Write history.parquet."""
    table = pa.Table.from_pylist(history, schema=HISTORY)
    run.storage.write_table(table, run.storage.join(run.uri, "history.parquet"))


def tracked(run: Run) -> TrackedRun | None:
    """Return the MLflow run, created if necessary; None if `train.mlflow_uri` is empty.

    Raises:
        ConfigError: the server can't be reached, or rejects a request.
    """
    uri = run.job.train.mlflow_uri
    return TrackedRun(uri, run.uri, settings(run.job)) if uri else None


def tracked_again(run: Run) -> tuple[TrackedRun | None, str]:
    """Like `tracked`, but return an error as a text, because once training has begun it is only a warning."""
    try:
        return tracked(run), ""
    except ConfigError as error:
        return None, str(error)
