"""Settings of an evaluation."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import CliImplicitFlag

from agr_ray.config.section import PositiveInt, Section, Timeout

Split = Literal["train", "val", "test", "all"]


class EvaluateConfig(Section):
    """Evaluation of a checkpoint on a prepared set."""

    checkpoint: str = ""
    """Folder or prefix of the checkpoint."""
    data: str = ""
    """Folder or prefix of a prepared set: the training set's or another."""
    split: Split = "test"
    """Split to evaluate; `all` for a set that was not trained on."""
    out: str = ""
    """Folder or prefix of predictions.parquet and metrics.json; empty: CHECKPOINT-eval-SPLIT-DIGEST."""
    allow_overlap: bool = False
    """Evaluate even if the checkpoint was trained on images of this split; the metrics then say so."""
    num_workers: PositiveInt | None = None
    """Number of processes that predict; none: the number of GPUs or spare CPUs, or no other process for 200 images or
    fewer."""
    use_gpu: bool = False
    """Use one GPU for each process that predicts."""
    batch_size: PositiveInt = 128
    """Images in a batch."""
    calibrate: CliImplicitFlag[bool] = False
    """Fit age intervals, probabilities and abstention on this split, and write calibration.json to the checkpoint."""
    correct_age: CliImplicitFlag[bool] = False
    """`calibrate` only: also correct predicted ages, by a linear regression of the true age on the predicted one. It
    removes the bias on these images. Scoring then writes corrected ages; metrics.json has the errors of both."""
    allow_uncalibrated: CliImplicitFlag[bool] = False
    """Allow [predict] settings that differ from those of the checkpoint's calibration. The calibration is then left out
    of the metrics."""
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """`calibrate` only: target fraction of true ages inside the intervals from age_low to age_high."""
    abstain_risk: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """`calibrate` only: target error rate of gender, and of race, where the model does not abstain."""
    lock_expiry_s: Timeout = 120.0
    """Seconds without a heartbeat after which another evaluation takes over the lock beside `out` and, with
    `calibrate`, the one beside the checkpoint. The heartbeat interval is a quarter of it."""

    @model_validator(mode="after")
    def _corrects_when_it_calibrates(self) -> Self:
        if self.correct_age and not self.calibrate:
            raise ValueError("correct_age needs calibrate: the correction is part of calibration.json")
        return self
