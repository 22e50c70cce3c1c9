"""Settings of a comparison of presets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from agr_ray.config.presets import PRESETS, check_preset
from agr_ray.config.section import PositiveInt, Section

_DEFAULT = tuple(name for name in PRESETS if name != "domain_adapt")


class CompareConfig(Section):
    """Which presets are trained, and how often."""

    out: str = "comparison"
    """Folder or prefix of the comparison: report.html, comparison.parquet, runs/ and evaluations/. Runs that it
    already holds are kept, so the same command resumes, and a command with other presets or more seeds adds runs. Must
    be shared storage if there are several nodes."""
    presets: Annotated[tuple[Annotated[str, AfterValidator(check_preset)], ...], Field(min_length=1)] = _DEFAULT
    """Presets to compare; `agr-ray models` describes them. Differences are relative to `paper` or, without it, to the
    first preset of the first command. By default all but `domain_adapt`, which needs two sets, and those that the data,
    the settings or the installation does not allow: the reason is printed."""
    seeds: PositiveInt = 1
    """Number of runs of each preset; each run has its own seed, from `train.seed` upwards."""
    image_size: Annotated[int, Field(ge=32, le=512)] | None = None
    """Side of the input of all networks, pixels; a preset whose backbone does not take it gets the next larger one
    (Inception-ResNet-v1: at least 80; ViT-B/16: a multiple of 16). None: each preset's own."""
    split: Literal["val", "test"] = "test"
    """Split on which they are compared."""
    max_concurrent: PositiveInt | None = None
    """Number of runs at the same time; none: as many as fit the cluster."""

    @field_validator("presets")
    @classmethod
    def _are_distinct(cls, presets: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(presets)) < len(presets):
            raise ValueError("must name each preset once")
        if "domain_adapt" in presets:
            raise ValueError("domain_adapt needs several prepared sets, and a comparison has one")
        return presets
