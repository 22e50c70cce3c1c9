"""Settings of a labelled data set: where it is, and how it is split."""

from __future__ import annotations

from typing import Final, Literal, Self

from pydantic import model_validator

from agr_ray.config.section import Fraction, PositiveInt, Section, Seed

MISSING_VALUES: Final = ("nan", "none", "na", "n/a", "#n/a", "<na>", "null", "-1", "u", "unknown", "?")
"""How sources write a missing label, beside an empty cell; compared without case and blanks."""


class SourceConfig(Section):
    """The labelled photographs."""

    kind: Literal["utkface", "fairface", "adience", "folder"] = "folder"
    """`utkface`: labels are in the file names; `fairface` and `adience`: labels are in the files that the data set
    publishes; `folder`: labels are in a CSV or Parquet table beside the images."""
    uri: str = ""
    """Folder or bucket prefix of the images, read with its subfolders."""
    name: str = ""
    """What the source is called in tables and reports; empty: its kind."""
    labels: str = ""
    """`folder` only: URI of the label table, .csv, .tsv or .parquet; empty: the one labels.csv, labels.tsv or
    labels.parquet in the folder."""
    key_column: str = "key"
    """`folder` only: column of the image's path below the folder. The others are age (years, or a range such as 25-32),
    age_low and age_high, gender, race, subject and split, in upper or lower case."""
    gender_codes: dict[str, str] = {}
    """`folder` only: what codes beside male and female mean, such as {"M": "male", "F": "female"}."""
    race_codes: dict[str, str] = {}
    """`folder` only: what codes beside the races of the label space mean: {"East Asian": "asian"}."""
    published_splits: bool = True
    """`fairface` only: the published training set becomes train, and the published validation set val and test, in the
    proportion of `split.val` to `split.test`. False: all images are dealt by [split]."""
    missing_values: tuple[str, ...] = MISSING_VALUES
    """`folder` only: values that mean a missing label or subject, beside an empty cell. Case and blanks do not count. A
    value that `gender_codes` or `race_codes` names is a code there."""


class SplitConfig(Section):
    """How images are dealt into train, validation and test: by content hash or subject, stratified."""

    val: Fraction = 0.1
    """Share of the images that validation gets."""
    test: Fraction = 0.15
    """Share of the images that the held-back test part gets; training gets what val and test leave."""
    seed: Seed = 0
    """Which of the possible splits is drawn."""
    sample: PositiveInt | None = None
    """Draw a stratified sample of so many images first and leave the rest out (the paper: 20000); none: use all."""

    @model_validator(mode="after")
    def _leaves_training_data(self) -> Self:
        if self.val + self.test > 1.0:
            raise ValueError(f"val {self.val} + test {self.test} is over 1")
        return self

    @property
    def fractions(self) -> dict[str, float]:
        """The share of every split."""
        return {"train": max(0.0, round(1.0 - self.val - self.test, 9)), "val": self.val, "test": self.test}
