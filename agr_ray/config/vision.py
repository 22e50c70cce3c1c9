"""Settings of decoding, detection and alignment, and of prepared sets."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from agr_ray.config.section import MAX_INT, Fraction, PositiveInt, Section, Timeout


class VisionConfig(Section):
    """How bytes become aligned faces. Training and scoring must use the same settings."""

    detector: Literal["mtcnn", "mtcnn_int8", "haar", "none"] = "mtcnn"
    """`mtcnn` finds faces and five landmarks; `mtcnn_int8` is the same in int8, faster but less exact, and needs the
    package openvino; `haar` finds boxes only and needs no weights; `none` uses whole chips."""
    min_face_px: Annotated[int, Field(ge=12, le=MAX_INT)] = 40
    """Shorter side of the smallest face to detect, pixels, once larger photographs are shrunk to `max_side_px`.
    In original pixels, the smallest face is larger there: by default, 1/32 of the longer side (94 px for 3,000, 188 px
    for 6,000). With `small_faces`, nothing is shrunk."""
    min_score: Fraction = 0.95
    """`mtcnn` and `mtcnn_int8` only: minimum probability of a face; detections below it are dropped."""
    max_side_px: PositiveInt = 1280
    """Photographs are shrunk to this longer side before detection, pixels; boxes stay in original pixels."""
    small_faces: bool = False
    """Detect faces without shrinking photographs, so that `min_face_px` is in original pixels; excludes `max_side_px`.
    A 24-megapixel photograph takes about seven times as long (4.4 s instead of 0.6 s) and 200 MiB more memory."""
    try_rotations: bool = False
    """If no face is found, also try the photograph rotated by 90, 180 and 270 degrees; for sideways photographs without
    an EXIF orientation. A photograph without a face takes three times as long; others do not. Column:
    `rotation_degrees`."""
    max_pixels: PositiveInt = 180_000_000
    """Images that decode to more pixels get the status too_large. A baseline JPEG is shrunk to near `max_side_px` while
    it is decoded, and only the shrunk size counts (200 megapixels take 22 MiB). At the limit, decoding takes 0.8 GiB
    for a PNG (1.5 GiB with 16-bit channels) and 2.6 GiB for a WebP. Raise it only if workers have memory to spare."""
    max_mib: PositiveInt = 64
    """Files larger than this, MiB, are not read; their status is too_large."""

    @model_validator(mode="after")
    def _has_only_knobs_with_an_effect(self) -> Self:
        if self.small_faces and self.max_side_px != type(self).model_fields["max_side_px"].default:
            raise ValueError(f"max_side_px = {self.max_side_px} has no effect with small_faces; give only one of them")
        if self.try_rotations and self.detector == "none":
            raise ValueError("try_rotations has no effect with detector = none, which detects no faces; remove it")
        return self


class PrepareConfig(Section):
    """Decode, detect and align once, and keep the crops."""

    out: str = ""
    """Folder or prefix of the prepared set: manifest.parquet, splits.tsv, crops/, prepare.json."""
    crop_side_px: Annotated[int, Field(ge=16, le=1024)] = 224
    """Side of the alignment template, pixels; the crop is stored with a margin of 10 % more on each side."""
    jpeg_quality: Annotated[int, Field(ge=50, le=100)] = 95
    """Quality of the stored crops."""
    num_workers: PositiveInt | None = None
    """Processes that decode, detect and align; none: as many as there are spare CPUs."""
    batch_size: PositiveInt = 32
    """Images in a worker's batch."""
    rows_per_file: PositiveInt = 1024
    """Crop rows in one Parquet file, the unit of work that is lost if a worker is killed."""
    allow_shrink: bool = False
    """Allow the set to follow a source that has lost more than half of its images; else that is an error."""
    outage_s: Annotated[float, Field(ge=0.0, le=1e6)] = 300.0
    """Seconds to retry while storage is unavailable. Then the job ends, and the same command resumes it."""
    lock_expiry_s: Timeout = 120.0
    """Seconds without a heartbeat after which the same command takes over the lock on `out` from a job that was killed
    on another machine. A job killed on this machine is detected at once. The heartbeat interval is a quarter of it."""
