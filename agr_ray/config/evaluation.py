"""Settings of an evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import CliImplicitFlag

from agr_ray.config.section import PositiveInt, Section, Timeout

Split = Literal["train", "val", "test", "all"]


class EvaluateConfig(Section):
    """A checkpoint measured on a prepared set."""

    checkpoint: str = ""
    """Folder or prefix of the checkpoint."""
    data: str = ""
    """Folder or prefix of a prepared set: the one trained on or any other."""
    split: Split = "test"
    """Which part is measured; `all` for a set that training never saw."""
    out: str = ""
    """Folder or prefix of predictions.parquet and metrics.json; empty: the checkpoint with -eval-SPLIT-DIGEST."""
    allow_overlap: bool = False
    """Measure even where images of this part were trained on; the metrics then say so."""
    num_workers: PositiveInt | None = None
    """Processes that predict; none: as many as there are GPUs or spare CPUs."""
    use_gpu: bool = False
    """One GPU for each predicting process."""
    batch_size: PositiveInt = 128
    """Images predicted at a time."""
    calibrate: CliImplicitFlag[bool] = False
    """Fit age intervals, probabilities and abstention on this split, and write calibration.json to the checkpoint."""
    allow_uncalibrated: CliImplicitFlag[bool] = False
    """Allow [predict] settings other than those that the checkpoint was calibrated under: its calibration is then not
    measured."""
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """`calibrate` only: share of true ages that the intervals age_low to age_high are to hold."""
    abstain_risk: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """`calibrate` only: highest share of errors wanted where the model does not abstain, in gender and in race."""
    lock_expiry_s: Timeout = 120.0
    """Seconds without a heartbeat after which another evaluation takes over the lock beside `out` and, with
    `calibrate`, the one beside the checkpoint. The heartbeat interval is a quarter of it."""
