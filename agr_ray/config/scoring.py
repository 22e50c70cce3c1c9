"""Settings of a scoring run, and the limits beyond which a face is flagged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import CliImplicitFlag

from agr_ray.config.section import MAX_INT, Fraction, NonNegativeFloat, PositiveInt, Section, Timeout

NearDuplicates = Literal["off", "count", "publish"]


class ScoreConfig(Section):
    """Scoring of photographs: one row for each image."""

    checkpoint: str = ""
    """Folder or prefix of the checkpoint."""
    input: str = ""
    """The photographs: a folder or bucket prefix, a Parquet table of their URIs (a manifest), or the manifest.json of
    an S3 Inventory."""
    input_kind: Literal["auto", "prefix", "manifest", "inventory"] = "auto"
    """Kind of input. `auto`: a URI that ends in manifest.json is an `inventory`; one that ends in .parquet is a
    `manifest`, a file or folder with the columns uri and, if known, etag and size_bytes; any other is a `prefix`, read
    with its subfolders."""
    include: tuple[str, ...] = ()
    """Score only photographs whose whole key (path below `input`) matches one of these globs, case-sensitively. In an
    inventory, it is the key in the bucket; in a manifest, the URI. `*` and `?` do not match a slash; `**/` matches any
    number of folders: ["**/*.jpg", "2026/**"]. Empty: keys with an image suffix; in a manifest, all."""
    exclude: tuple[str, ...] = ()
    """Globs of keys to leave out, even if `include` matches them."""
    min_bytes: Annotated[int, Field(ge=0, le=MAX_INT)] = 0
    """Leave out objects of fewer bytes. Objects above vision.max_mib are not left out: their status is too_large."""
    out: str = ""
    """Folder or prefix of the results: images/, faces/, rejects/ and demographics/, each with a folder run=ID for each
    run."""
    table: Literal["none", "delta", "iceberg"] = "none"
    """`delta`: also commit each published run to Delta Lake tables, whose logs are in images/_delta_log/, and so on.
    `iceberg`: to tables of an Iceberg catalogue. No file is copied. Runs that were published before are committed, too.
    Requires the package deltalake or pyiceberg on the machine that runs this command."""
    iceberg_catalog: str = "default"
    """`iceberg` only: name of the catalogue in pyiceberg's configuration: .pyiceberg.yaml, or variables such as
    PYICEBERG_CATALOG__DEFAULT__URI."""
    iceberg_namespace: str = ""
    """`iceberg` only: namespace of the tables images, faces, rejects and demographics. It is created if necessary."""
    num_workers: PositiveInt | None = None
    """Number of processes that decode, detect, align and, without use_gpu, predict; by default one for each spare
    CPU."""
    use_gpu: bool = False
    """Predict on GPUs, in one process for each GPU besides the `num_workers`."""
    batch_size: PositiveInt = 16
    """Photographs in a worker's batch."""
    rows_per_file: PositiveInt = 256
    """Images in one part, the unit of work that is lost if a worker is killed. A published file has up to 256 parts."""
    attributes: tuple[Literal["age", "gender", "race"], ...] = ("age", "gender", "race")
    """Attributes to write; default: all that the checkpoint predicts."""
    group_by: tuple[str, ...] = ()
    """Columns by which demographic tables are grouped: named groups of `key_pattern`, or columns of the table
    `metadata`."""
    key_pattern: str = ""
    """Regular expression (RE2) that is searched in each URI and has named groups for `group_by`, such as
    /(?P<date>[0-9-]{10})/."""
    metadata: str = ""
    """Parquet file or folder with a column uri and columns for group_by."""
    min_cell: Annotated[int, Field(ge=0, le=MAX_INT)] = 0
    """Hide cells (group, age group, gender and race) of demographic tables that count fewer faces than this, and other
    cells from which they could be computed; 0: none. Only protects people together with aggregate_only."""
    near_duplicates: NearDuplicates = "count"
    """`count`: demographic tables also have n_unique, in which near-duplicate photographs of a face count once. A
    perceptual hash of its pixels finds them. With min_cell, cells of few distinct faces are hidden. `publish`: also
    write the hashes into images/ and faces/; rejected with pseudonymise. `off`: faces are not hashed."""
    aggregate_only: bool = False
    """Publish only demographic tables and counts, no rows of images or faces. Requires pseudonymise and ledger."""
    ledger: str = ""
    """`aggregate_only` only: private folder or prefix, outside `out`, for HMACs of the images that later runs skip."""
    pseudonymise: str = ""
    """File with a secret key of at least 32 bytes: published URIs and ids are HMACs (SHA-256); empty: plain."""
    outage_s: Annotated[float, Field(ge=0.0, le=1e6)] = 300.0
    """Seconds to retry while storage is unavailable. Then the job ends, and the same command resumes it."""
    lock_expiry_s: Timeout = 120.0
    """Seconds without a heartbeat after which another run takes over the lock on `out`. The heartbeat interval is a
    quarter of it."""
    max_refused: Fraction = 0.5
    """Largest share of the photographs that may be rejected for the same reason (access denied, not an image, ...).
    Above it the run fails with an error that quotes the reason, and nothing is published. 1: no limit."""
    allow_uncalibrated: CliImplicitFlag[bool] = False
    """Allow settings in [vision] and [predict] that differ from those of the checkpoint's calibration, and then score
    without it. Rows have no age intervals, no corrected ages, no calibrated probabilities and no abstention, and
    `calibrated` is false."""
    allow_empty: bool = False
    """Publish an empty run if the input has no photographs; otherwise that is an error."""
    limit: PositiveInt | None = None
    """Maximum number of keys that are read, after include and exclude; keys scored before count, too. By default
    all."""


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
