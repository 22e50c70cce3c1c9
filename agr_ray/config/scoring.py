"""Settings of a scoring run, and the limits beyond which a face is flagged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import CliImplicitFlag

from agr_ray.config.section import MAX_INT, Fraction, NonNegativeFloat, PositiveInt, Section, Timeout


class ScoreConfig(Section):
    """Photographs -> one row an image."""

    checkpoint: str = ""
    """Folder or prefix of the checkpoint."""
    input: str = ""
    """The photographs: a folder or bucket prefix, a Parquet manifest, or the manifest.json of an S3 Inventory."""
    input_kind: Literal["auto", "prefix", "manifest", "inventory"] = "auto"
    """What input is. `auto`: one that ends in manifest.json is an `inventory`; one that ends in .parquet is a
    `manifest`, a file or folder of the columns uri and, if known, etag and size_bytes; any other is a `prefix`, read
    with its subfolders."""
    include: tuple[str, ...] = ()
    """Globs of which a key must match one: the path below a prefix, the key in an inventory's bucket, the URI in a
    manifest, from end to end and in its own case. `*` and `?` stop at a slash, `**/` is any folders or none:
    ["**/*.jpg", "2026/**"]. Empty: keys that end as image files do; of a manifest all."""
    exclude: tuple[str, ...] = ()
    """Globs of keys that are left out, even if included."""
    min_bytes: Annotated[int, Field(ge=0, le=MAX_INT)] = 0
    """Objects of fewer bytes are left out. Those over vision.max_mib are not: they become rows, too_large."""
    out: str = ""
    """Folder or prefix of the results: images/, faces/, rejects/ and demographics/, each with run=ID/*.parquet."""
    num_workers: PositiveInt | None = None
    """Processes that decode, detect and align, and predict unless use_gpu; none: as many as there are spare CPUs."""
    use_gpu: bool = False
    """Predict on GPUs, in as many further processes as there are GPUs."""
    batch_size: PositiveInt = 16
    """Photographs that a worker takes at a time."""
    rows_per_file: PositiveInt = 256
    """Images in one part of the work: what a kill may cost each worker. Published files hold 256 parts each."""
    attributes: tuple[Literal["age", "gender", "race"], ...] = ("age", "gender", "race")
    """Which attributes are written at all."""
    group_by: tuple[str, ...] = ()
    """Columns by which demographic tables are grouped: names captured by key_pattern, or columns of metadata."""
    key_pattern: str = ""
    """Regular expression (RE2) with named groups, searched in each URI, such as /(?P<date>[0-9-]{10})/."""
    metadata: str = ""
    """Parquet file or folder of a column uri and further ones about the images, joined for group_by."""
    min_cell: Annotated[int, Field(ge=0, le=MAX_INT)] = 0
    """Cells of fewer faces than this are hidden in demographic tables, and those from which they follow; 0: none.
    It protects nobody unless aggregate_only."""
    aggregate_only: bool = False
    """Publish demographic tables and counts only, no row of an image or a face. Needs pseudonymise and ledger."""
    ledger: str = ""
    """With aggregate_only: private folder or prefix, outside out, of the HMACs of what the next run must skip."""
    pseudonymise: str = ""
    """File of a secret key of 32 bytes or more: published URIs and ids are HMACs (SHA-256) under it; empty: plain."""
    outage_s: Annotated[float, Field(ge=0.0, le=1e6)] = 300.0
    """Seconds to retry while storage is unavailable. Then the job ends, and the same command resumes it."""
    lock_expiry_s: Timeout = 120.0
    """Seconds for which the lock on out must stand still before another run takes it over, such as that of a run that
    was killed; a heartbeat comes every quarter of it."""
    max_refused: Fraction = 0.5
    """Largest share of the photographs that may be rejected for the same reason (access denied, not an image, ...).
    Above it the run fails with an error that quotes the reason, and nothing is published. 1: no limit."""
    allow_uncalibrated: CliImplicitFlag[bool] = False
    """Allow [vision] and [predict] settings other than those that the checkpoint was calibrated under: rows then have
    no age intervals, no calibrated probabilities and no abstention, and `calibrated` is false in each."""
    allow_empty: bool = False
    """Publish an empty run if the input has no photographs; otherwise that is an error."""
    limit: PositiveInt | None = None
    """Score only the first so many keys that include and exclude leave, scored before or not; none: all."""


class GatesConfig(Section):
    """Limits beyond which a scored face is flagged: it keeps its row, and is not counted in demographic tables."""

    min_side_px: NonNegativeFloat = 0.0
    """Shorter side of a face's box, pixels of the original image, below which it is `small`; 0: no limit."""
    min_sharpness: NonNegativeFloat = 0.0
    """Variance of the Laplacian at 112 pixels a side below which a face is `blurred`; 0: no limit."""
    max_turn_degrees: Annotated[float, Field(gt=0.0, le=180.0)] = 180.0
    """Yaw or pitch, either way, degrees, above which a face is `turned`; 180: no limit."""
    min_detector_score: Fraction = 0.0
    """Detector score below which a face is `unsure`; 0: no limit. vision.min_score drops faces, this flags them."""
