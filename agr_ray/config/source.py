"""Settings of a labelled data set and of its split."""

from __future__ import annotations

from typing import Final, Literal, Self

from pydantic import model_validator

from agr_ray.config.section import Fraction, PositiveInt, Section, Seed

MISSING_VALUES: Final = ("nan", "none", "na", "n/a", "#n/a", "<na>", "null", "-1", "u", "unknown", "?")
"""Values that mean a missing label, as an empty cell does; case and blanks are ignored."""

LabelColumn = Literal["key", "age", "age_low", "age_high", "gender", "race", "subject", "split", "fold"]

COLUMN_WORDS: Final = {
    "sex": "gender",
    "ethnicity": "race",
    "ethnic": "race",
    "years": "age",
    "person": "subject",
    "identity": "subject",
    "subset": "split",
    "partition": "split",
}
"""Other words for a column, which may be a part of a name."""


class SourceConfig(Section):
    """The labelled photographs."""

    kind: Literal["utkface", "fairface", "adience", "morph2", "fgnet", "folder"] = "folder"
    """`utkface` and `fgnet`: labels are in the file names; `fairface`, `adience` and `morph2`: labels are in the files
    that the data set publishes; `folder`: labels are in a CSV or Parquet table beside the images."""
    uri: str = ""
    """Folder or bucket prefix of the images, read with its subfolders."""
    name: str = ""
    """Name of the source in tables and reports; empty: its kind, or, for `folder`, the name of the prepared set."""
    labels: str = ""
    """`folder`: label table, .csv, .tsv or .parquet: its URI, or its path below the folder; empty: the one
    labels.csv, labels.tsv or labels.parquet in the folder. `morph2`: URI of its CSV file; empty:
    morph_2008_nonCommercial.csv in the folder. `utkface`: folder of CORAL's lists utk_train.csv and utk_test.csv: only
    images in them are used, 21 to 60 years old, and get the split of their list; empty: all images."""
    columns: dict[LabelColumn, str] = {}
    """`folder` only: column names in the table, where they differ from the expected ones: key=file,gender=sex means
    that the column `file` holds the key; subject= means that there is no subject. Expected are key (the image's path
    below the folder), age (years, or a range such as 25-32), age_low and age_high, gender, race, subject, split and
    fold, in upper or lower case."""
    gender_codes: dict[str, str] = {}
    """`folder` only: meaning of codes other than male and female, such as w=female,m=male."""
    race_codes: dict[str, str] = {}
    """`folder` only: meaning of codes other than the label space's races, such as hispanic=others."""
    published_splits: bool = True
    """`fairface` only: the published validation set is the split test, whatever `split.test` says, and the published
    training set is split into train and val by `split.val`. False: [split] assigns all images."""
    missing_values: tuple[str, ...] = MISSING_VALUES
    """`folder` only: values that mean a missing label or subject, as an empty cell does. Case and blanks are ignored.
    `gender_codes` and `race_codes` take precedence."""


class SplitConfig(Section):
    """How images are split into train, validation and test: by content hash or subject, stratified."""

    val: Fraction = 0.1
    """Fraction of the images for validation."""
    test: Fraction = 0.15
    """Fraction of the images for the test split; the rest is for training."""
    seed: Seed = 0
    """Seed of the split."""
    sample: PositiveInt | None = None
    """Size of a stratified sample of the images to use (Bosco and Chi, 2025: 20000); none: all. All images are
    cropped nonetheless, because the sample is drawn by content and subject; the others have no split."""
    near_duplicates: Literal["count", "exclude"] = "count"
    """`count`: images with a near-duplicate (a re-encoded, resized or slightly cropped copy) in a split that is held
    out from theirs are counted, and listed in near_duplicates.parquet; `exclude`: they also get no split. Train then
    keeps no near-duplicate of val or test, and val none of test; test is never changed. Copies, byte for byte, to which
    the source assigns different splits are left out in the same way with `exclude`; otherwise they are an error."""

    @model_validator(mode="after")
    def _leaves_training_data(self) -> Self:
        if self.val + self.test > 1.0:
            raise ValueError(f"val {self.val} + test {self.test} is greater than 1")
        return self

    @property
    def fractions(self) -> dict[str, float]:
        """The share of every split."""
        return {"train": max(0.0, round(1.0 - self.val - self.test, 9)), "val": self.val, "test": self.test}
