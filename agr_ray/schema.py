"""Table schemas and their version: the only place that names a column or a dtype.

Tables hold labels as words ("female", "asian"), so that a reader of the Parquet needs no code book. The label space
(`agr_ray.labels`) defines the words. A missing label is null.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Literal

import pyarrow as pa

SCHEMA_VERSION: Final = 2
"""Raised whenever a column changes its meaning or its type; new nullable columns do not raise it."""

ABSTAINED: Final = "abstained"
"""Stands for a class in counts: the model was too uncertain to tell it, or predicted none."""

SPLITS: Final = ("train", "val", "test")


class Status(StrEnum):
    """What became of one input image. Every input ends as exactly one row with exactly one status."""

    OK = "ok"
    """At least one face was found and processed. In a manifest: the bytes were read and a label can be used; the crop
    row tells whether they decode."""
    FALLBACK = "fallback"
    """Labelled images only: no face was found, and the middle of the image serves as the crop."""
    NO_FACE = "no_face"
    """The image is readable and no face was found in it."""
    UNREADABLE = "unreadable"
    """The file starts like an image but cannot be decoded: it is corrupt or truncated."""
    TOO_LARGE = "too_large"
    """Over the limit of bytes or of pixels, which is checked before decoding."""
    NOT_AN_IMAGE = "not_an_image"
    """Empty, or not in a supported image format."""
    MISSING = "missing"
    """The object was listed but no longer exists, or it has a label row but does not exist."""
    CHANGED = "changed"
    """The object is not the one that was listed: its etag differs."""
    ARCHIVED = "archived"
    """The object is in an archive, such as S3 Glacier: it must be restored before it can be read."""
    FAILED = "failed"
    """Storage kept failing or denied access, or the image kept killing its worker."""
    BAD_LABEL = "bad_label"
    """Labelled sources only: none of the given labels, or not the split or the fold, can be parsed, the label rows
    disagree, or there is none. The image is not read."""


CROP_STATUSES: Final = (Status.OK, Status.FALLBACK)
"""The statuses of crop rows that carry a crop, and so can be trained and evaluated on."""

SCORED_STATUSES: Final = (Status.OK, Status.NO_FACE)
"""The statuses of image rows that are not rejected."""

RETRIED_STATUSES: Final = (Status.FAILED, Status.MISSING, Status.CHANGED)
"""The statuses that say nothing about an image's content: the next run tries the image again if it is still listed."""

IMAGE_STATUSES: Final = (
    Status.OK,
    Status.NO_FACE,
    Status.UNREADABLE,
    Status.TOO_LARGE,
    Status.NOT_AN_IMAGE,
    Status.MISSING,
    Status.CHANGED,
    Status.ARCHIVED,
    Status.FAILED,
)
"""The statuses of scoring's image rows: input rows = ok + no_face + the rest, the rejects."""

LANDMARK_NAMES: Final = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
"""Sides as the viewer sees them."""

BOX: Final = pa.list_(pa.float32(), 4)
"""x0, y0, x1, y1 in pixels of the original image, upright (after EXIF orientation)."""

LANDMARKS: Final = pa.list_(pa.float32(), 2 * len(LANDMARK_NAMES))
"""x, y of each of `LANDMARK_NAMES` in turn, in pixels of the original image, upright."""

HASH_WORDS: Final = 2

PERCEPTUAL_HASH: Final = pa.list_(pa.int64(), HASH_WORDS)
"""64 bits each of the upper and of the lower half of an aligned face, as signed numbers, which all readers know."""

ROTATION_DEGREES: Final = pa.field("rotation_degrees", pa.int32())
"""Clockwise rotation (0, 90, 180 or 270) in which the faces were found; always 0 without `vision.try_rotations`.
Boxes and landmarks are in pixels of the image before this rotation. Null if the image was not decoded."""

RUN_ID: Final = pa.field("run_id", pa.string(), nullable=False)
"""The scoring run that wrote a row; in every table that it publishes."""

LABEL_FIELDS: Final = (
    pa.field("age", pa.float32()),  # years
    pa.field("gender", pa.string()),  # a class of the label space
    pa.field("race", pa.string()),  # a class of the label space
)

AGE_RANGE_FIELDS: Final = (
    pa.field("age_low", pa.float32()),  # years; both are null unless the source gives a range, whose age is null
    pa.field("age_high", pa.float32()),  # years, included; labels.AGE_MAX_YEARS where the range is open
)

LABEL_COLUMNS: Final = ("age", "age_low", "age_high", "gender", "race")
"""Columns of labels in every table and label file."""

MANIFEST: Final = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),  # hash of the URI; in scoring, of the URI and the etag
        pa.field("uri", pa.string(), nullable=False),  # path or s3:// URI
        pa.field("key", pa.string(), nullable=False),  # path below the source's root: the same on every machine
        pa.field("etag", pa.string()),  # S3's; of a local file, size-mtime_ns; null: unknown
        pa.field("size_bytes", pa.int64()),  # of the file
        pa.field("source", pa.string(), nullable=False),  # name of the data set: source.name
        pa.field("content_hash", pa.string()),  # SHA-256 of the bytes, hex; null where they were not read
        pa.field("group_id", pa.string()),  # subject where known, else content hash; one group, one split
        pa.field("split", pa.string()),  # one of SPLITS; null: in none (rejected, or left out)
        pa.field("fold", pa.int32()),  # of the source's own folds for cross-validation, from 0; null: it has none
        *LABEL_FIELDS,
        *AGE_RANGE_FIELDS,
        pa.field("status", pa.string(), nullable=False),  # ok, or why the row is rejected before it is read
        pa.field("error", pa.string()),  # why it is rejected; of an ok row: which of its labels were dropped
    ]
)
"""One row for each image of a labelled source."""

SCORE_MANIFEST: Final = pa.schema(
    [
        *(MANIFEST.field(name) for name in ("image_id", "uri", "etag", "size_bytes")),
        pa.field("storage_class", pa.string()),  # S3's storage class when listed; null: unknown, or a local file
    ]
)
"""One row for each image to score."""

QUALITY_FIELDS: Final = (
    pa.field("yaw", pa.float32()),  # degrees; positive turns towards the viewer's right
    pa.field("pitch", pa.float32()),  # degrees; positive looks up
    pa.field("roll", pa.float32()),  # degrees; positive is clockwise as the viewer sees it
    pa.field("sharpness", pa.float32()),  # variance of the Laplacian of the aligned face
)

FINGERPRINT_FIELDS: Final = (
    pa.field("perceptual_hash", pa.uint64()),  # of the aligned face, vision.perceptual_hash; null: it is of one colour
    pa.field("thumbnail", pa.binary(256)),  # 16 x 16 grey pixels of the aligned face, row after row
)
"""By which near-duplicates are found; null unless the status is one of CROP_STATUSES."""

CROPS: Final = pa.schema(
    [
        *MANIFEST,
        pa.field("crop", pa.binary()),  # JPEG, square, aligned, with margin; null unless in CROP_STATUSES
        pa.field("template", pa.string()),  # name and version of the alignment template
        pa.field("detector", pa.string()),  # vision.detector
        pa.field("detector_score", pa.float32()),  # MTCNN: probability of a face; Haar: its weight
        pa.field("num_faces", pa.int32()),  # faces found, of which the one nearest the centre is the labelled one
        ROTATION_DEGREES,
        pa.field("box", BOX),
        pa.field("landmarks", LANDMARKS),
        *QUALITY_FIELDS,
        *FINGERPRINT_FIELDS,
    ]
)
"""One row for each manifest row, whatever happened to it."""

NEAR_DUPLICATES: Final = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # from which split.near_duplicates = "exclude" removes it
        pa.field("near_key", pa.string(), nullable=False),  # the likest image of a split that is held out from it
        pa.field("near_split", pa.string(), nullable=False),
        pa.field("distance_bits", pa.int32(), nullable=False),  # bits in which the perceptual hashes differ, of 64
        pa.field("likeness", pa.float32(), nullable=False),  # correlation of the thumbnails
    ]
)
"""One row for each image with a near-duplicate in a split that is held out from it: val or test from train, test from
val."""

CLASS_PROBS: Final = pa.map_(pa.string(), pa.float32())
"""Class -> probability, in the order of the label space. A map names its classes, so it fits every label space."""

PREDICTION_FIELDS: Final = (
    pa.field("age_pred", pa.float32()),  # years
    pa.field("age_spread", pa.float32()),  # standard deviation of the predicted ages, years; null: no distribution
    pa.field("p_male", pa.float32()),  # probability of "male"
    pa.field("gender_pred", pa.string()),  # the likelier class
    pa.field("race_pred", pa.string()),  # the likeliest class
    pa.field("race_probs", CLASS_PROBS),
    pa.field("precision", pa.string()),  # data type that the network computed in: float32 or bfloat16
)

PREDICTIONS: Final = pa.schema(
    [
        *(MANIFEST.field(name) for name in ("image_id", "uri", "key", "source", "group_id", "split")),
        *LABEL_FIELDS,
        *AGE_RANGE_FIELDS,
        pa.field("status", pa.string(), nullable=False),  # one of CROP_STATUSES
        pa.field("num_faces", pa.int32()),  # faces found in the image
        *QUALITY_FIELDS,
        *PREDICTION_FIELDS,
        pa.field("detector_score", pa.float32()),  # null, like box, if no face was detected
        pa.field("box", BOX),
    ]
)
"""One row for each labelled crop: truth beside prediction. A task without a head predicts null."""

FLAGS: Final = ("small", "blurred", "turned", "unsure")
"""Why a face is flagged: its box, sharpness, head pose or detector score is beyond a limit of `[gates]`."""

FACE: Final = pa.struct(
    [
        pa.field("box", BOX),
        pa.field("detector_score", pa.float32()),  # MTCNN: probability of a face; Haar: its weight
        pa.field("landmarks", LANDMARKS),
        *QUALITY_FIELDS,
        pa.field("age", pa.float32()),  # years; null, like gender and race, if the model does not predict it
        pa.field("age_low", pa.float32()),  # years: the true age is in age_low to age_high as often as calibrated
        pa.field("age_high", pa.float32()),  # years; null, like age_low, if the model is not calibrated in age
        pa.field("p_male", pa.float32()),  # probability of "male", calibrated if the model is
        pa.field("gender", pa.string()),  # the likelier class, even if `abstain` names it
        pa.field("race", pa.string()),  # the likeliest class, even if `abstain` names it
        pa.field("race_probs", CLASS_PROBS),  # like p_male, calibrated if the model is
        pa.field("abstain", pa.list_(pa.string())),  # those of gender and race that are too uncertain to be counted
        pa.field("flags", pa.list_(pa.string())),  # of FLAGS: reasons not to count this face at all
        pa.field("perceptual_hash", PERCEPTUAL_HASH),  # of the crop's pixels; null unless it is to be published
    ]
)

IMAGES: Final = pa.schema(
    [
        *SCORE_MANIFEST,
        pa.field("status", pa.string(), nullable=False),  # one of IMAGE_STATUSES
        pa.field("error", pa.string()),  # why it could not be scored, in one line
        pa.field("width_px", pa.int32()),  # of the original image, upright (after EXIF orientation)
        pa.field("height_px", pa.int32()),  # likewise
        ROTATION_DEGREES,
        pa.field("faces", pa.list_(FACE)),  # left to right; empty unless status is ok
        RUN_ID,
        pa.field("model_digest", pa.string(), nullable=False),  # names the network
        pa.field("config_digest", pa.string(), nullable=False),  # names the settings and the calibration
        pa.field("calibrated", pa.bool_(), nullable=False),  # false: no intervals, raw probabilities, no abstention
        pa.field("precision", pa.string()),  # data type that the network computed in; null: no face to predict
        pa.field("detector", pa.string(), nullable=False),  # vision.detector
        pa.field("scored_at", pa.timestamp("us", tz="UTC"), nullable=False),  # pseudonymised: start of the run
        pa.field("schema_version", pa.int32(), nullable=False),  # SCHEMA_VERSION
    ]
)
"""One row for each input image of a scoring run, whatever happened to it."""

PHOTOGRAPH_COLUMNS: Final = ("width_px", "height_px", ROTATION_DEGREES.name)
"""Columns of image rows that are null if the image was not decoded."""

FACES: Final = pa.schema(
    [
        *(field for field in IMAGES if field.name not in ("size_bytes", "storage_class", "status", "error", "faces")),
        pa.field("face_index", pa.int32(), nullable=False),  # from 0, left to right
        *FACE,
    ]
)
"""One row for each face of a scoring run."""

REJECTS: Final = pa.schema([field for field in IMAGES if field.name not in (*PHOTOGRAPH_COLUMNS, "faces", "precision")])
"""One row for each input image of a scoring run that could not be scored."""

ATTRIBUTES: Final = ("age", "gender", "race")
"""Attributes of a face that are predicted."""

DEMOGRAPHIC_ATTRIBUTES: Final = (
    "age_group",  # a class of the label space; null: not broken down by it
    "gender",  # likewise
    "race",  # likewise
)
"""Attributes by which faces are counted: the keys of `LabelSpace.classes`."""

DEMOGRAPHIC_COUNTS: Final = (
    "num_images",  # images of the group
    "num_no_face",  # readable images of the group without a face
    "num_rejected",  # images of the group that could not be scored
    "num_faces",  # faces of the group, flagged ones included
    "num_flagged",  # faces of the group beyond a limit of [gates], which count in no cell
    "num_abstained",  # other faces of the group without a class in an attribute of this breakdown
)
"""The group's counts in DEMOGRAPHICS."""

DEMOGRAPHICS: Final = pa.schema(
    [
        pa.field("is_total", pa.bool_(), nullable=False),  # over all groups; a group's own columns may be null, too
        pa.field("breakdown", pa.string(), nullable=False),  # of DEMOGRAPHIC_ATTRIBUTES, separated by commas
        *(pa.field(name, pa.string()) for name in DEMOGRAPHIC_ATTRIBUTES),
        pa.field("n", pa.int64()),  # faces predicted to be in the cell; null: suppressed, as for each count below
        pa.field("share", pa.float64()),  # of the faces that got a class in this breakdown; null: none did
        pa.field("share_corrected", pa.float64()),  # of all faces that passed the gates, estimated
        pa.field("share_low", pa.float64()),  # 90 % interval of share_corrected
        pa.field("share_high", pa.float64()),  # the upper end
        pa.field("correction", pa.string()),  # why share_corrected is null
        pa.field("suppressed", pa.bool_(), nullable=False),  # n is hidden
        *(pa.field(name, pa.int64()) for name in DEMOGRAPHIC_COUNTS),
        pa.field("n_unique", pa.int64()),  # n, but near-duplicates count once; null: not counted, or suppressed
        pa.field("num_unique", pa.int64()),  # of the group: distinct faces that passed the gates; null likewise
    ]
)
"""One row for each cell of a breakdown of a group; the grouping columns, strings, come first. RUN_ID comes last in
published files."""

HISTORY: Final = pa.schema(
    [
        pa.field("epoch", pa.int32(), nullable=False),  # from 1
        pa.field("step", pa.int64(), nullable=False),  # optimiser steps since the first epoch
        pa.field("lr", pa.float64(), nullable=False),  # at the end of the epoch
        pa.field("train_loss", pa.float64(), nullable=False),
        pa.field("val_loss", pa.float64()),
        pa.field("val_age_mae_years", pa.float64()),
        pa.field("val_age_within_5", pa.float64()),
        pa.field("val_gender_accuracy", pa.float64()),
        pa.field("val_race_accuracy", pa.float64()),
        pa.field("val_objective", pa.float64()),  # what early stopping and `best` minimise
        pa.field("num_train_rows", pa.int64(), nullable=False),
        pa.field("num_val_rows", pa.int64()),
        pa.field("epoch_s", pa.float64(), nullable=False),
        pa.field("samples_per_s", pa.float64(), nullable=False),
        pa.field("data_wait_share", pa.float64(), nullable=False),  # of the training part of the epoch
        pa.field("val_gender_balanced_accuracy", pa.float64()),
        pa.field("val_race_balanced_accuracy", pa.float64()),
        pa.field("val_worst_group_age_mae_years", pa.float64()),  # of large enough groups by gender, race and both
        pa.field("val_balanced_objective", pa.float64()),  # val_objective of balanced errors: what sweeps minimise
        pa.field("val_age_distance_years", pa.float64()),  # mean, to the true age or age range; the MAE of exact ages
    ]
)
"""One row for each epoch."""

COMPARED_METRICS: Final = ("age_mae_years", "age_within_5", "age_one_off", "gender_accuracy", "race_accuracy")

COMPARISON: Final = pa.schema(
    [
        pa.field("preset", pa.string(), nullable=False),
        pa.field("seeds", pa.list_(pa.int64()), nullable=False),  # of its complete runs
        pa.field("failures", pa.list_(pa.string()), nullable=False),  # one line for each run that failed
        pa.field("side_px", pa.int32(), nullable=False),  # of the network's input
        pa.field("parameters", pa.int64(), nullable=False),
        pa.field("multiply_adds", pa.int64(), nullable=False),  # for one image
        pa.field("train_samples_per_s", pa.float64()),  # in the median epoch of its runs
        pa.field("score_images_per_s", pa.float64()),  # network and read-out on this machine's CPU
        *(
            pa.field(f"{metric}{part}", pa.float64())
            for metric in COMPARED_METRICS
            for part in (
                *("", "_low", "_high", "_difference", "_difference_low", "_difference_high"),
                *("_adjusted_low", "_adjusted_high", "_cited"),
            )
        ),
    ]
)
"""One row for each preset. Differences are from `paper` or, without it, the first preset, on the same images;
`_adjusted_low` to `_adjusted_high` is the interval of the difference, corrected for the number of presets; `_cited` is
what the paper cites, from other data and protocols."""

FOLD_METRICS: Final = (
    *("age_mae_years", "age_within_5", "age_exact_group", "age_one_off"),
    *("gender_accuracy", "race_accuracy"),
)

FOLDS: Final = pa.schema(
    [
        pa.field("fold", pa.string(), nullable=False),
        pa.field("num_train", pa.int64(), nullable=False),  # images
        pa.field("num_val", pa.int64(), nullable=False),
        pa.field("num_test", pa.int64(), nullable=False),
        pa.field(
            "num_left_out", pa.int64(), nullable=False
        ),  # of training: near-duplicates or people of the test images
        *(pa.field(metric, pa.float64()) for metric in FOLD_METRICS),
    ]
)
"""One row for each fold of a cross-validation; a metric without labels is null."""

FOLD_SUMMARY: Final = pa.schema(
    [
        pa.field("metric", pa.string(), nullable=False),  # of FOLD_METRICS
        pa.field("num_folds", pa.int64(), nullable=False),  # that have the metric
        pa.field("mean", pa.float64(), nullable=False),  # of the folds' values
        pa.field("std", pa.float64()),  # of the folds' values, with n - 1; null: one fold
        pa.field("standard_error", pa.float64()),  # std / sqrt(num_folds)
        pa.field("pooled", pa.float64(), nullable=False),  # over the images of all folds
    ]
)
"""One row for each metric of a cross-validation."""

STRESSED_METRICS: Final = ("age_mae_years", "age_bias_years", "age_within_5", "gender_accuracy", "race_accuracy")

CLEAN: Final = "clean"
"""Stands for the uncorrupted images in the column `corruption` of STRESS."""
YAW: Final = "yaw"
"""Stands there for a bin of head poses of the uncorrupted images."""

STRESS_PREDICTIONS: Final = pa.schema(
    [MANIFEST.field("image_id"), *(field for field in PREDICTION_FIELDS if field.name != "precision")]
)
"""One row for each image of a stress test, under one corruption of one severity."""

STRESS: Final = pa.schema(
    [
        pa.field("corruption", pa.string(), nullable=False),  # CLEAN, a corruption, or YAW
        pa.field("severity", pa.int32(), nullable=False),  # 0 for CLEAN, 1 to 5; for YAW, the bin from 1
        pa.field("level", pa.string(), nullable=False),  # what the severity is, such as `16 px of the face`
        pa.field("n", pa.int64(), nullable=False),  # images, with or without labels
        *(
            pa.field(f"{metric}{part}", pa.float64())  # a share is a fraction; null: no such label or head
            for metric in STRESSED_METRICS
            for part in ("", "_low", "_high", "_difference", "_difference_low", "_difference_high")
        ),
    ]
)
"""One row for each condition of a stress test. `_low` and `_high` are 95 % intervals over persons, null with fewer than
two. Differences are from CLEAN on the same images, and null for CLEAN and YAW."""

NEAREST: Final = pa.schema(
    [
        MANIFEST.field("image_id"),
        MANIFEST.field("key"),
        pa.field("nearest_by_features", pa.string(), nullable=False),  # key of a training image
        pa.field("cosine", pa.float32(), nullable=False),  # of the two images' features, less the mean of all
        pa.field("nearest_by_hash", pa.string(), nullable=False),  # key of a training image
        pa.field("distance_bits", pa.int32(), nullable=False),  # bits in which the perceptual hashes differ, of 64
    ]
)
"""One row for each measured image, beside the training images that it is most like."""

TrialState = Literal["complete", "pruned", "failed", "unfinished"]

TRIALS: Final = pa.schema(
    [
        pa.field("number", pa.int32(), nullable=False),  # from 0, in the order in which trials were started
        pa.field("state", pa.string(), nullable=False),  # a TrialState
        pa.field("why", pa.string(), nullable=False),  # it was pruned or failed; else empty
        pa.field("epochs", pa.int32(), nullable=False),  # number of finished epochs
        pa.field("best_epoch", pa.int32()),  # its checkpoint is kept, and the errors below are measured after it
        pa.field("objective", pa.float64()),  # val_balanced_objective; lower is better
        pa.field("age_mae_years", pa.float64()),
        pa.field("gender_error", pa.float64()),  # 1 - balanced accuracy
        pa.field("race_error", pa.float64()),  # 1 - balanced accuracy
        pa.field("worst_group_age_mae_years", pa.float64()),
        pa.field("is_feasible", pa.bool_(), nullable=False),  # within all constraints
        pa.field("is_best", pa.bool_(), nullable=False),
        pa.field("is_on_front", pa.bool_(), nullable=False),  # no other beats it in all three errors
        pa.field("num_failures", pa.int32(), nullable=False),  # failed attempts, the last one included
        pa.field("wall_s", pa.float64(), nullable=False),
    ]
)
"""One row for each trial of a sweep, and a column for each searched key; null if the trial did not search it."""

TEMPLATE: Final = "five_point_v1"
"""Name and version of the alignment template of `agr_ray.vision.align`."""
