"""Settings of a cross-validation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from agr_ray.config.section import PositiveInt, Section, Seed


class CrossValidateConfig(Section):
    """How the set is divided into folds. Each fold is a training run that is tested on images it did not see."""

    out: str = "cross-validation"
    """Folder or prefix of the cross-validation: predictions.parquet, folds.parquet, summary.parquet, runs/ and
    evaluations/. Folds that it already holds are kept, so the same command resumes. Must be shared storage if there are
    several nodes."""
    protocol: Literal["random_folds", "published_folds", "leave_one_person_out", "balanced_halves"] = "random_folds"
    """`random_folds`: folds of equal size, stratified, by person; `published_folds`: those of the source, such as
    Adience's five; `leave_one_person_out`: a fold for each person, as for FG-NET; `balanced_halves`: two halves of
    equal race and gender, and the rest, which both test, as for MORPH II. Images that `prepare` gave no split are left
    out; its splits do not matter otherwise."""
    folds: Annotated[int, Field(ge=2, le=100)] = 5
    """`random_folds` only: number of folds."""
    seed: Seed = 0
    """Seed of the folds and of the validation images."""
    val: Annotated[float, Field(gt=0.0, le=0.5)] = 0.1
    """Share of a fold's training images that is used for validation, by person."""
    near_duplicates: Literal["keep", "exclude"] = "keep"
    """`keep`: near-duplicates of a fold's test images (re-encoded, resized or slightly cropped copies) stay in its
    training; `exclude`: they are left out. Published folds may also have copies of test images, and images of the same
    people, in training: `exclude` leaves these out, too; with `keep`, the command ends with an error."""
    max_concurrent: PositiveInt | None = None
    """Number of folds that are trained at the same time; none: as many as fit the cluster."""
