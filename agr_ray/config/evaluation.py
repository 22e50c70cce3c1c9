"""Settings of an evaluation."""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import CliImplicitFlag

from agr_ray.config.section import PositiveInt, Section, Seed, SeveralWords, Timeout

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
    """Number of processes that predict; none: the number of GPUs or spare CPUs, or no other process for 250 images or
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
    stress: CliImplicitFlag[bool] = False
    """Also measure corrupted copies of the images: fewer pixels, blur, noise, JPEG, darkness, sunglasses, masks and
    others, each at five severities. Writes stress.parquet, stress.png and stress.svg to `out`. After a kill, the same
    command resumes."""
    stress_images: PositiveInt = 2000
    """`stress` only: maximum number of images; a random sample of the split is used if it has more."""
    stress_seed: Seed = 0
    """`stress` only: seed of the sample and of the random choices of corruptions, such as the direction of a motion."""
    stress_corruptions: tuple[str, ...] = ()
    """`stress` only: corruptions to measure, by name; empty: all."""
    explain: CliImplicitFlag[bool] = False
    """Also draw sheets of faces into OUT/explain: Grad-CAM maps of right and wrong predictions, the worst errors of
    each group, and the training images that the measured ones are most like. They show people: do not publish them
    without their consent."""
    explain_train_data: str = ""
    """`explain` only: prepared set with the images that the checkpoint was trained on; empty: `data`."""
    age_thresholds: tuple[Annotated[int, Field(ge=1, le=100)], ...] = (18, 21, 25)
    """Legal age thresholds, years, for which metrics.json has false-adult and false-minor rates."""
    age_buffer_years: Annotated[int, Field(ge=0, le=50)] = 7
    """Years above the threshold that a predicted age must be with a buffer: 7 years above 18 are "Challenge 25"."""
    compare: SeveralWords = ""
    """Two models to compare on the same images: `--compare A B`. Each is a checkpoint, which is first evaluated on
    `data`, or the folder of an earlier evaluation. Writes paired.json to `out`; empty: beside A's evaluation."""
    lock_expiry_s: Timeout = 120.0
    """Seconds without a heartbeat after which another evaluation takes over the lock beside `out` and, with
    `calibrate`, the one beside the checkpoint. The heartbeat interval is a quarter of it."""

    @property
    def compared(self) -> tuple[str, ...]:
        """Return the two models of `compare`; none if nothing is compared."""
        return tuple(json.loads(self.compare)) if self.compare else ()

    @model_validator(mode="after")
    def _has_distinct_thresholds(self) -> Self:
        if len(set(self.age_thresholds)) < len(self.age_thresholds):
            raise ValueError(f"age_thresholds {list(self.age_thresholds)} must be distinct")
        return self

    @model_validator(mode="after")
    def _compares_two(self) -> Self:
        if not self.compare:
            return self
        if not self.compare.startswith("[") or len(self.compared) != 2:
            num_models = len(self.compared) if self.compare.startswith("[") else 1
            raise ValueError(f"compare must name two models, as in --compare A B; found {num_models}")
        for name, value, default in (("checkpoint", self.checkpoint, ""), ("calibrate", self.calibrate, False)):
            if value != default:
                raise ValueError(f"compare and {name} exclude each other: compare names both models itself")
        return self

    @model_validator(mode="after")
    def _has_only_knobs_with_an_effect(self) -> Self:
        if self.correct_age and not self.calibrate:
            raise ValueError("correct_age needs calibrate: the correction is part of calibration.json")
        if self.stress_corruptions and not self.stress:
            raise ValueError("stress_corruptions has no effect without stress")
        if self.explain_train_data and not self.explain:
            raise ValueError("explain_train_data has no effect without explain")
        return self
