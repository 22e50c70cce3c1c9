"""Every knob: frozen pydantic models, filled from a TOML recipe, the environment and the command line.

One recipe serves every job: a job reads the sections that it names and only checks the spelling and
range of the others. Later sources win: defaults < recipe (`--config FILE`) < environment
(`AGR_RAY_TRAIN__LR=3e-4`) < command line (`--train.lr 3e-4`).
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import operator
import os
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliImplicitFlag,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from agr_ray.errors import ConfigError
from agr_ray.redact import redacted
from agr_ray.schema import MISSING_VALUES, SPLITS


def _one_or_several(value: Any) -> Any:
    """Return a list of words, given as one or as JSON, as JSON; a list of one is its word, and one word is itself."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f'{value!r} is no JSON, as which lists are written, such as \'["a", "b"]\'') from None
    if not isinstance(value, list | tuple):
        return value
    if not all(isinstance(each, str) and each for each in value):
        raise ValueError(f"{list(value)} must be a list of words, none of them empty")
    return json.dumps(value) if len(value) > 1 else "".join(value)


def _is_one(value: float) -> bool:
    """Say whether a knob that came later is at its default, and so left out of what is written and digested."""
    return value == 1.0


def _plain_name(value: str) -> str:
    """Reject a run name that is not a single folder name valid on every file system."""
    is_plain = value == value.strip() and value.isprintable() and "/" not in value and value not in (".", "..")
    if not is_plain or len(value.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"{value[:_LONGEST_NAME]!r} must be a single folder name: no slash, no control character, no space at "
            f"either end, {_LONGEST_NAME} bytes at most"
        )
    return value


def _without_login(value: str | None) -> str | None:
    """Reject credentials in a server's URL, because URLs appear in messages and records."""
    if value is not None and "@" in value:
        raise ValueError(
            f"{redacted(value)!r} must be a URL without user and password; keys come from the usual AWS variables"
        )
    return value


Name = Annotated[str, AfterValidator(_plain_name)]
Address = Annotated[str | None, AfterValidator(_without_login)]
OneOrSeveral = Annotated[str, BeforeValidator(_one_or_several)]
"""Text to all sources of settings: they would tear a path at its comma, or take 7 for a number, were it a union."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
MAX_INT = 2**31 - 1
"""Largest integer that any knob accepts: some parts of torch, OpenCV and Ray accept no larger one."""
MAX_FLOAT = 1e38
"""Largest value of any other number: networks compute in float32, and this is its maximum."""
PositiveInt = Annotated[int, Field(gt=0, le=MAX_INT)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=MAX_FLOAT)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=MAX_FLOAT)]
AnyInt = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""NumPy, torch and Optuna all accept seeds in this range."""
Timeout = Annotated[float, Field(ge=0.1, le=1e6)]
"""Seconds; longer ones overflow the clocks of sockets and threads."""
_LONGEST_NAME = 200
Split = Literal["train", "val", "test", "all"]


class Section(BaseModel):
    """A table of the recipe: frozen, unknown keys refused, each field documented beneath it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class StorageConfig(Section):
    """Where `s3://` is. Keys come from the usual AWS variables, profiles or instance roles."""

    endpoint_url: Address = None
    """Address of an S3-compatible server; none: AWS_ENDPOINT_URL if set, else AWS itself."""
    region: str | None = None
    """Region of the buckets. None: from the usual AWS variables. AWS buckets in other regions are found anyway."""
    anonymous: bool = False
    """Send unsigned requests, without credentials; for public buckets."""
    requester_pays: bool = False
    """Agree to pay for requests and data transfer; requester-pays buckets require it."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """Where URLs name the bucket: `path` puts it in the path, `virtual` in the host name. `auto` follows the AWS
    profile; without a setting there, it means `virtual` on AWS and `path` elsewhere."""
    timeout_s: Timeout = 30.0
    """Seconds to connect, and between two packets, before a request is tried again."""
    max_attempts: PositiveInt = 6
    """Times that a throttled, timed-out or failed request is tried in all, with back-off between."""

    @model_validator(mode="after")
    def _someone_pays(self) -> Self:
        if self.anonymous and self.requester_pays:
            raise ValueError("storage.requester_pays: needs credentials, but storage.anonymous sends none; unset one")
        return self


class ClusterConfig(Section):
    """Which Ray cluster does the work."""

    address: str = ""
    """`local` starts one in this process; `auto` or HOST:PORT joins one; empty: RAY_ADDRESS if set, else `local`."""
    num_cpus: PositiveInt | None = None
    """Logical CPUs of a `local` cluster; none: the machine's own, but at least 8: they cap scheduling, not threads."""
    object_store_mib: PositiveInt = 1024
    """Shared memory of a `local` cluster's object store, MiB."""
    include_dashboard: bool = True
    """Whether a `local` cluster starts Ray's dashboard."""
    autoscaler_wait_s: Annotated[float, Field(ge=0.0, le=1e6)] = 900.0
    """Seconds that a cluster's autoscaler has to add the nodes that a job asks for; 0: a cluster that is too small as
    it is is refused. One without an autoscaler is refused at once."""


class SourceConfig(Section):
    """The labelled photographs."""

    kind: Literal["utkface", "folder"] = "folder"
    """`utkface`: labels are in the file names; `folder`: labels are in a CSV or Parquet table beside the images."""
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
    """`folder` only: what codes beside white, black, asian, indian and others mean: {"East Asian": "asian"}."""
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


class VisionConfig(Section):
    """How bytes become aligned faces. Training and scoring must agree in it."""

    detector: Literal["mtcnn", "haar", "none"] = "mtcnn"
    """`mtcnn` finds faces and five landmarks; `haar` boxes only, with no weights; `none` takes whole chips."""
    min_face_px: Annotated[int, Field(ge=12, le=MAX_INT)] = 40
    """Shorter side of the smallest face to detect, in pixels of a photograph no larger than `max_side_px`.
    In larger photographs it grows with their longer side: by default, it is 1/32 of it (94 px for 3,000, 188 px for
    6,000). With `small_faces` it is always in original pixels."""
    min_score: Fraction = 0.95
    """`mtcnn` only: probability below which a face is not counted."""
    max_side_px: PositiveInt = 1280
    """Photographs are shrunk to this longer side before detection, pixels; boxes stay in original pixels."""
    small_faces: bool = False
    """Detect faces at full size, so that `min_face_px` is in original pixels; cannot be combined with `max_side_px`.
    A 24-megapixel photograph takes about seven times as long (4.4 s instead of 0.6 s) and 200 MiB more memory."""
    try_rotations: bool = False
    """If no face is found, also try the photograph rotated by 90, 180 and 270 degrees; for sideways photographs
    without EXIF. A photograph without a face takes three times as long; others do not. Column: `rotation_degrees`."""
    max_pixels: PositiveInt = 180_000_000
    """Images that decode to more pixels get the status too_large. A baseline JPEG is shrunk to near `max_side_px` while
    it is decoded, and only the shrunk size counts (200 megapixels take 22 MiB). At the limit, decoding takes 0.8 GiB
    for a PNG (1.5 GiB with 16-bit channels) and 2.6 GiB for a WebP. Raise it only if workers have memory to spare."""
    max_mib: PositiveInt = 64
    """Files of more MiB are not read: status too_large."""

    @model_validator(mode="after")
    def _has_only_knobs_with_an_effect(self) -> Self:
        if self.small_faces and self.max_side_px != type(self).model_fields["max_side_px"].default:
            raise ValueError(f"max_side_px = {self.max_side_px} has no effect with small_faces; remove one of them")
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
    """Images that a worker takes at a time."""
    rows_per_file: PositiveInt = 1024
    """Crop rows in one Parquet file: what a killed run may have to do again, for each worker."""
    allow_shrink: bool = False
    """Allow the set to follow a source that has lost more than half of its images; else that is an error."""
    lock_expiry_s: Timeout = 120.0
    """Seconds without a heartbeat after which the same command takes over the lock on `out` from a job that was killed
    on another machine. A job killed on this machine is detected at once. The heartbeat interval is a quarter of it."""


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"trunk": "resnet50", "age_head": "linear", "input_side_px": 224},
    "lightweight": {"trunk": "mobilenet_v3_small", "age_head": "linear", "input_side_px": 112, "bn_momentum": 0.1},
}
"""Values that `model.preset` puts in place of `ModelConfig`'s defaults; explicit keys win over both."""


class ModelConfig(Section):
    """The network: trunk and heads."""

    preset: Literal["paper", "lightweight"] = "paper"
    """`paper`: ResNet50 and linear heads; `lightweight`: MobileNetV3-small. Other keys of this table win over it."""
    trunk: Literal["resnet18", "resnet34", "resnet50", "mobilenet_v3_small", "mobilenet_v3_large"] = "resnet50"
    """torchvision network whose last layer is replaced by the heads."""
    weights: str = "none"
    """First weights of the trunk: `none` (random), `imagenet` (torchvision's download), or a path or URI."""
    tasks: tuple[Literal["age", "gender", "race"], ...] = ("age", "gender", "race")
    """Which heads the network has."""
    age_head: Literal["linear", "distribution"] = "linear"
    """`linear`: one number (paper eq. 7); `distribution`: a bin for each year, 0 to 116, read out by expectation."""
    input_side_px: Annotated[int, Field(ge=32, le=512)] = 224
    """Side of the square that the network sees, pixels."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the features dropped before the heads in training."""
    bn_momentum: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Momentum of every batch norm; none: the trunk's own (0.01 in MobileNetV3: too slow for short runs)."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "paper")
        return {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **values}

    @model_validator(mode="after")
    def _has_distinct_tasks(self) -> Self:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must name each of age, gender, race at most once and one at least: {self.tasks}")
        return self


class LossConfig(Section):
    """L = age_weight L_age + gender_weight L_gender + race_weight L_race (paper eqs 11 and 21)."""

    age_weight: NonNegativeFloat = 1.0
    """Weight of the age loss."""
    gender_weight: NonNegativeFloat = 0.5
    """Weight of the gender loss."""
    race_weight: NonNegativeFloat = 0.5
    """Weight of the race loss."""
    weighting: Literal["fixed", "uncertainty"] = "fixed"
    """`fixed`: by the weights above, as the paper does; `uncertainty`: by weights that are learnt, one for each task,
    beginning with those above (Kendall et al. 2018). Losses that are reported are weighted by those above always."""
    age_loss: Literal["l1", "mse", "huber"] = "l1"
    """Of the error e in years: `l1` is |e| (paper eq. 12); `mse` is e^2 (its eq. 26); `huber` is e^2 / 2 up to
    huber_delta_years d, and d (|e| - d / 2) beyond."""
    huber_delta_years: PositiveFloat = 1.0
    """`huber` only: error above which the loss grows linearly, years."""
    age_scale_years: PositiveFloat = 1.0
    """Scaled age: years that count as an error of 1. An `l1` loss is divided by it, `mse` and `huber` by its square."""
    age_sigma_years: PositiveFloat = 2.0
    """`distribution` head only: width of the Gaussian target, years (DLDL-v2)."""
    age_expectation_weight: NonNegativeFloat = 1.0
    """`distribution` head only: weight of `age_loss` of the expectation beside the divergence."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of a gender or race label spread over all classes."""

    @model_validator(mode="after")
    def _begins_with_weights(self) -> Self:
        if self.weighting == "uncertainty":
            for key in ("age_weight", "gender_weight", "race_weight"):
                if getattr(self, key) == 0.0:
                    raise ValueError(f"{key} {getattr(self, key)} must be over 0 where weighting is uncertainty")
        return self


class AugmentConfig(Section):
    """Random changes of training crops, drawn anew for every image and epoch. Applied on the device."""

    flip_probability: Fraction = 0.5
    """Chance of a horizontal flip."""
    rotation_degrees: Annotated[float, Field(ge=0.0, le=180.0)] = 10.0
    """Rotation drawn evenly from plus and minus this."""
    scale: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Zoom drawn evenly from 1 - scale to 1 + scale; 0: none."""
    shift: Annotated[float, Field(ge=0.0, le=0.5)] = 0.05
    """Shift in x and in y drawn evenly from plus and minus this share of the side: random cropping in the margin."""
    brightness: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Brightness factor drawn from 1 - this to 1 + this; 0: none."""
    contrast: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Contrast factor drawn from 1 - this to 1 + this; 0: none."""
    saturation: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Saturation factor drawn from 1 - this to 1 + this; 0: none."""
    erasing_probability: Fraction = 0.0
    """Chance that a random rectangle of 2 to 20 % of the image is filled with its mean; 0: none."""
    randaugment_ops: Annotated[int, Field(ge=0, le=8)] = 0
    """RandAugment: operations drawn for each image out of 14 (shears, shifts, rotation, brightness, saturation,
    contrast, sharpness, posterisation, solarisation and so on), before all else; 0: none."""
    randaugment_magnitude: Annotated[float, Field(ge=0.0, le=30.0)] = 9.0
    """RandAugment's strength, the same for all its operations: 0 to 30."""
    equalize: bool = False
    """Histogram equalisation (paper eq. 17) of each crop's luminance, colour kept. Not random: it is part of the
    network's input, kept with the checkpoint, and done in validation, evaluation and scoring too."""
    mixup_alpha: NonNegativeFloat = 0.0
    """Each image is blended with another of its batch, by a share drawn from Beta(this, this), and learns the labels of
    both, each by its share; 0: none. With cutmix_alpha too, an image is blended or cut with even chances."""
    cutmix_alpha: NonNegativeFloat = 0.0
    """As mixup_alpha, but a box of the other image, of a share so drawn, replaces what was there; 0: none."""


class TrainConfig(Section):
    """The training run."""

    data: OneOrSeveral = ""
    """Folder or prefix of a prepared set (what `jobs/prepare.py` wrote), or a list of several of one crop_side_px,
    learnt from and validated on together: ["data/utkface", "data/adience"]. A label that a row lacks is left out of the
    loss, so a set may have no race."""
    # Left out of what is written and digested where it is empty, so that runs begun before there was this knob go on.
    data_shares: Annotated[tuple[PositiveFloat, ...], Field(exclude_if=operator.not_)] = ()
    """Several sets only: how training rows are drawn, with replacement, a number for each set: [3, 1] is three of the
    first to one of the second. An epoch has as many rows as all sets together. Needs the crops in memory and begins as
    balance does, which then evens out each set by itself. Empty: each row once, as many of each set as there are."""
    out: str = "runs"
    """Folder or prefix of all runs; this one goes into OUT/NAME. Shared storage where there are several nodes."""
    name: Name = ""
    """Name of the run; empty: `train-` and the digest of the configuration. The same name resumes the run."""
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Data-parallel processes, each with its own model replica and share of the batch. Two numbers, [FEWEST, MOST]:
    as many as the cluster has room for, and again so when a machine leaves or joins; then the run goes on from its last
    checkpoint, and a step still takes batch_size images."""
    use_gpu: bool = False
    """One GPU for each worker; else the CPU, with gloo."""
    gpus_per_worker: Annotated[float, Field(gt=0.0, le=1.0, exclude_if=_is_one)] = 1.0
    """`use_gpu` only: share of a GPU that Ray reserves for the worker. With 0.5 two runs of one worker each, such as
    trials of a sweep, take one GPU together, if its memory holds both. Less than 1 needs num_workers 1."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs that Ray reserves for a worker."""
    threads_per_worker: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Threads that a worker computes with; none: the machine's CPUs shared out among its workers."""
    batch_size: Annotated[int, Field(gt=0, le=2**20)] = 32
    """Images in one optimiser step over all workers together."""
    accumulate: PositiveInt = 1
    """Parts in which a worker takes its share of batch_size, one after the other, adding up their gradients, where its
    memory can't hold the whole. The step is the same, but that batch norm sees the parts, which need two images each.
    1: the whole at once."""
    epochs: PositiveInt = 50
    """Passes over the training part, at most."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Adam is the paper's (eq. 19)."""
    lr: PositiveFloat = 1e-4
    """Learning rate; the highest one of the schedule."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor of the learning rate for each stage of the trunk, counted from the heads, which learn at the full rate:
    the last stage at lr * this, the one before at lr * this^2. A stage begins where the image gets smaller. 1: off."""
    freeze_epochs: Annotated[int, Field(ge=0, le=MAX_INT)] = 0
    """Epochs at the beginning in which the heads alone learn: the trunk's weights and its batch norms' statistics stand
    still. It wants first weights (model.weights) worth keeping. 0: none; epochs: throughout."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay: L2 for adam and sgd, decoupled for adamw."""
    schedule: Literal["step", "one_cycle", "cosine", "plateau", "constant"] = "step"
    """`step` is the paper's (eq. 20); `one_cycle` warms up and anneals over all epochs; `cosine` anneals; `plateau`
    cuts when validation stops getting better."""
    step_size_epochs: PositiveInt = 20
    """`step` only: epochs between two cuts of the learning rate."""
    plateau_epochs: PositiveInt = 5
    """`plateau` only: epochs without a better objective on validation after which the learning rate is cut."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """`step` and `plateau` only: factor of each cut."""
    warmup: Fraction = 0.3
    """`one_cycle` and `cosine`: share of all steps in which the learning rate rises."""
    clip_norm: NonNegativeFloat = 0.0
    """Largest gradient norm, longer ones are scaled down; 0: no limit."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay for each step of the moving average of weights that is validated and kept; 0: the weights themselves."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the forward and backward passes' arithmetic (autocast), weights stay float32; auto: bfloat16 where the
    device has instructions for it. float16 is for GPUs that have none for bfloat16 (V100, T4) and needs use_gpu: the
    loss is scaled to keep small gradients, and a step whose gradients overflow is left out."""
    tf32: bool = True
    """Whether a GPU may round the factors of float32 products to 10 bits (TF32): several times as fast since Ampere."""
    compile: bool = False
    """Compile the network for training (torch.compile). Needs a C++ compiler on every node, and the first step a minute
    or more; a smaller last batch or another of input_sides_px compiles once more, then for any size."""
    sync_batch_norm: bool = False
    """Batch norm over the batches of all workers at once, two exchanges more for each layer: for shares of batch_size
    that are too small for statistics, about 8 and less. Needs use_gpu."""
    input_sides_px: tuple[Annotated[int, Field(ge=32, le=1024)], ...] = ()
    """Progressive resizing: sides of the network's input, pixels, in equal shares of the epochs, such as [48, 64, 88].
    Small ones are quick. The last must be model.input_side_px. Empty: that throughout."""
    balance: Literal["none", "age", "gender", "race", "cells"] = "none"
    """Draw training rows, with replacement, so that age groups (0-10, 11-20 and so on), genders, races or the cells of
    all three come evenly. Rows without the label keep their share. It needs each worker's crops in memory (cache_mib):
    the epoch that first streams them there, of a run and after each resume, comes as it is. `none`: each row once."""
    balance_power: Fraction = 1.0
    """`balance` only: a row is drawn by (rows that share its label) to minus this: 1 evens out, 0 not at all."""
    use_fallback: bool = True
    """Whether chips in which no face was found are trained on. They are always evaluated."""
    early_stopping_epochs: Annotated[int, Field(ge=0, le=MAX_INT)] = 10
    """Stop after so many epochs without a better objective on validation; 0: never."""
    seed: Seed = 0
    """Seed of first weights, shuffling and augmentation."""
    max_failures: Annotated[int, Field(ge=-1, le=MAX_INT)] = 3
    """Times that a failed worker group is started again from the last checkpoint; -1: without end."""
    outage_s: Annotated[float, Field(ge=0.0, le=1e6)] = 300.0
    """How long storage that has gone away, or a cluster that has become too small, is waited for, seconds."""
    lock_expiry_s: Timeout = 120.0
    """Seconds for which the lock on the run must stand still before the same command takes it over from a driver that
    was killed on another machine; of one on this machine it is known at once. A heartbeat comes every quarter of it."""
    num_to_keep: PositiveInt = 1
    """Checkpoints of the best epochs that are kept in NAME/checkpoints, beside the last."""
    cache_mib: Annotated[int, Field(ge=0, le=MAX_INT)] = 4096
    """Memory of each worker in which its share of the training crops stays decoded after the first epoch, MiB, if it
    fits; as much again for validation."""
    shuffle_rows: PositiveInt = 2048
    """Rows in each worker's shuffle buffer while crops are streamed; from memory, the whole share is shuffled."""
    mlflow_uri: str = ""
    """MLflow tracking server that the run is logged to as well, such as http://HOST:5000; empty: none. Needs the
    package mlflow on every node."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _one_number_or_two(cls, value: object) -> object:
        """Take the command line's one number, which comes as a list of one because lists are allowed."""
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    @property
    def min_workers(self) -> int:
        """Return the fewest workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Return the most workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def data_uris(self) -> tuple[str, ...]:
        """Return the prepared sets, one or several."""
        return tuple(json.loads(self.data)) if self.data.startswith("[") else (self.data,)

    @model_validator(mode="after")
    def _fewest_before_most(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers [{self.min_workers}, {self.max_workers}]: the fewest come first")
        return self

    @model_validator(mode="after")
    def _cuts_before_it_stops(self) -> Self:
        if self.schedule == "plateau" and 0 < self.early_stopping_epochs <= self.plateau_epochs:
            raise ValueError(
                f"plateau_epochs {self.plateau_epochs} must be less than early_stopping_epochs "
                f"{self.early_stopping_epochs} (0: never stop), or training stops before the first cut"
            )
        return self

    @model_validator(mode="after")
    def _has_the_gpu_it_needs(self) -> Self:
        if self.precision == "float16" and not self.use_gpu:
            raise ValueError("precision float16 needs use_gpu; on a CPU: auto, float32, bfloat16")
        if self.sync_batch_norm and not self.use_gpu:
            raise ValueError("sync_batch_norm true needs use_gpu: torch has it for GPUs only")
        if self.gpus_per_worker < 1.0 and (not self.use_gpu or self.max_workers > 1):
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g} needs use_gpu and num_workers 1: "
                "NCCL takes no two workers of one run on one GPU"
            )
        return self


Scalar = bool | int | float | str
"""A value as TOML writes it; bool first, because it is an int as well."""

TrialError = Literal["age_mae_years", "gender_error", "race_error", "worst_group_age_mae_years"]
"""What a sweep's constraints may limit, all on validation: the mean absolute error of age; 1 - balanced accuracy; the
mean absolute error of age in the worst group by gender, race or both of ten rows and more."""

PAPER_POINT: Mapping[str, Scalar] = {
    "loss.age_weight": 1.0,
    "loss.gender_weight": 0.5,
    "loss.race_weight": 0.5,
    "train.lr": 1e-4,
}
"""What the paper trains with (its eqs 11 and 19)."""


class ParameterConfig(Section):
    """What a sweep tries for one key. Exactly one of uniform, log_uniform, integer and choice."""

    uniform: tuple[float, float] | None = None
    """Any number from the first to the second, both included."""
    log_uniform: tuple[PositiveFloat, PositiveFloat] | None = None
    """The same, each factor as likely as any other: for learning rates and weights over several powers of ten."""
    integer: tuple[AnyInt, AnyInt] | None = None
    """Any whole number from the first to the second, both included."""
    choice: tuple[Scalar | tuple[Scalar, ...], ...] | None = None
    """One of these, in no order."""
    step: PositiveFloat | None = None
    """`uniform` and `integer` only: distance between the values that are tried, counted from the first; none: any."""
    when: dict[str, Scalar | tuple[Scalar, ...]] = {}
    """Other searched keys, and the value or values of each for which this one is searched: {"train.optimizer" = "sgd"}.
    Where one has another value, this key stays what the recipe says."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        kinds = ("uniform", "log_uniform", "integer", "choice")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(kinds)} is needed, not {' and '.join(given) or 'none'}")
        if self.choice is not None:
            if len(set(self.choice)) < 2 or len(set(self.choice)) < len(self.choice):
                raise ValueError(f"choice {list(self.choice)} needs two values or more, each once")
        elif self.low >= self.high:
            raise ValueError(f"{given[0]} [{self.low:g}, {self.high:g}]: the first must be less than the second")
        if self.step is not None:
            if self.uniform is None and self.integer is None:
                raise ValueError(f"step {self.step:g} goes with uniform and integer only, not with {given[0]}")
            if self.integer is not None and self.step != int(self.step):
                raise ValueError(f"step {self.step:g} of an integer must be whole")
            if self.step > self.high - self.low:
                raise ValueError(f"step {self.step:g} is more than {given[0]} [{self.low:g}, {self.high:g}] is wide")
        return self

    @property
    def range(self) -> tuple[float, float] | None:
        """The bounds; None: it is a choice."""
        return self.uniform or self.log_uniform or self.integer

    @property
    def low(self) -> float:
        """The first bound, of what is no choice."""
        assert self.range is not None
        return self.range[0]

    @property
    def high(self) -> float:
        """The second bound, of what is no choice."""
        assert self.range is not None
        return self.range[1]


class TuneConfig(Section):
    """A sweep: trainings under different settings, of which the best is kept."""

    space: dict[str, ParameterConfig] = {}
    """What is searched: a table [tune.space] with a line for each dotted key of [model], [loss], [augment], [train] or
    [predict], such as "train.lr" = {log_uniform = [1e-4, 1e-2]}, "train.batch_size" = {integer = [32, 128], step = 32}
    or "train.optimizer" = {choice = ["adam", "sgd"]}. All other keys are the recipe's."""
    out: str = "sweeps"
    """Folder or prefix of all sweeps; this one goes into OUT/NAME. Shared storage where there are several nodes."""
    name: Name = ""
    """Name of the sweep; empty: `sweep-` and the digest of the configuration. The same name resumes the sweep."""
    trials: PositiveInt = 20
    """Trials, pruned and failed ones included. A sweep that has made fewer goes on when this is raised; so does
    one that has finished, with --add."""
    max_epochs: PositiveInt | None = None
    """Epochs of all trials together after which the sweep stops; none: no limit."""
    max_hours: PositiveFloat | None = None
    """Hours after which the sweep stops, as if it were interrupted: the same command goes on, for as long again; none:
    no limit."""
    mode: Literal["scalar", "pareto"] = "scalar"
    """`scalar` minimises the mean, over the model's tasks, of the error on validation over the error of guessing the
    median age or the most frequent class: years for age, 1 - balanced accuracy for gender and race. 1 is no better than
    guessing, 0 is perfect. `pareto` minimises the three errors at once, stops no trial early, and reports the front:
    the trials that no other beats in all errors."""
    constraints: dict[TrialError, float] = {}
    """Highest values allowed of age_mae_years, gender_error, race_error (1 - balanced accuracy) and
    worst_group_age_mae_years (the largest age MAE of a group by gender, race or both of ten validation rows and more).
    A trial beyond one is best only if all are, and Optuna is told by how much; ASHA goes by the objective alone."""
    asha: bool = True
    """`scalar` only: stop a trial that after grace_epochs, and after reduction times as many, and so on, is not among
    the best 1 / reduction of those that got so far (asynchronous successive halving). train.epochs can't be searched
    then: schedules of other lengths can't be compared epoch by epoch."""
    grace_epochs: PositiveInt = 2
    """`asha` only: epochs that each trial may make."""
    reduction: Annotated[int, Field(ge=2, le=MAX_INT)] = 3
    """`asha` only: 1 in so many goes on."""
    paper_first: bool = True
    """Whether the first trial has the paper's values (loss weights 1, 0.5, 0.5; train.lr 1e-4) of what is searched."""
    points_to_evaluate: tuple[dict[str, Scalar | tuple[Scalar, ...]], ...] = ()
    """Values of searched keys that the next trials have: [[tune.points_to_evaluate]] tables of "train.lr" = 3e-3 and
    the like. Keys that one leaves out are drawn."""
    random_trials: Annotated[int, Field(ge=0, le=MAX_INT)] = 10
    """Trials whose values are drawn at random before Optuna's sampler (TPE) makes something of those before."""
    seed: Seed = 0
    """Seed of what is drawn. Trials at the same time end in another order each time, so only one after the other
    are the same again."""
    max_concurrent: PositiveInt | None = None
    """Trials at the same time; none: as many as the cluster has room for, on one machine as it has cores."""
    max_failures: Annotated[int, Field(ge=0, le=MAX_INT)] = 1
    """Times that a trial which raises, or a process of which dies, goes on from its last checkpoint. A loss that is no
    number is not tried again. In a sweep this stands for train.max_failures."""
    study: str = ""
    """Where Optuna keeps the study: a file of the local disk that ends in .journal, or sqlite:///FILE or
    postgresql://USER:PASSWORD@HOST/DB; empty: study.journal in the sweep's folder. Sweeps with the same study and
    study_name learn from each other's trials."""
    study_name: str = ""
    """Name of the study; empty: the sweep's."""

    @model_validator(mode="after")
    def _keeps_its_study_where_it_can_be_locked(self) -> Self:
        allowed = "a local file whose name ends in .journal, or a database URL"
        scheme, is_url, _ = self.study.partition("://")
        if self.study and not is_url and not self.study.endswith(".journal"):
            raise ValueError(f"study {_shown(self.study)} must be {allowed}")
        if scheme in ("s3", "file") and is_url:
            raise ValueError(
                f"study {scheme}://... must be {allowed}; the default is stored beside the sweep, in any storage"
            )
        return self


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
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """`calibrate` only: share of true ages that the intervals age_low to age_high are to hold."""
    abstain_risk: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """`calibrate` only: highest share of errors wanted where the model does not abstain, in gender and in race."""
    lock_expiry_s: Timeout = 120.0
    """Seconds without a heartbeat after which another evaluation takes over the lock beside `out` and, with
    `calibrate`, the one beside the checkpoint. The heartbeat interval is a quarter of it."""


class PredictConfig(Section):
    """How a network's outputs become predictions, in evaluation and in scoring alike."""

    flip_average: bool = False
    """Predict the crop and its mirror image and average: a little more accurate, twice the time."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Type of the network's arithmetic (autocast); auto: bfloat16 where the device has instructions for it."""


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
    """Seconds that a running job waits for storage that has gone away before it gives up, resumably."""
    lock_expiry_s: Timeout = 120.0
    """Seconds for which the lock on out must stand still before another run takes it over, such as that of a run that
    was killed; a heartbeat comes every quarter of it."""
    max_refused: Fraction = 0.5
    """Largest share of the photographs that may be rejected for the same reason (access denied, not an image, ...).
    Above it the run fails with an error that quotes the reason, and nothing is published. 1: no limit."""
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


class RenderConfig(Section):
    """Synthetic faces, drawn with known labels."""

    out: str = ""
    """Folder or prefix of chips/ with labels.parquet, and photographs/ with faces.parquet."""
    num_chips: Annotated[int, Field(ge=0, le=MAX_INT)] = 2000
    """Single faces of 200 x 200 pixels."""
    num_photographs: Annotated[int, Field(ge=0, le=MAX_INT)] = 40
    """Photographs with one to six faces."""
    seed: Seed = 0
    """Which faces are drawn: the same seed and index always give the same face."""
    lock_expiry_s: Timeout = 120.0
    """Seconds without a heartbeat after which another run takes over the lock in `out`. The heartbeat interval is a
    quarter of it."""


SECTIONS: Mapping[str, type[Section]] = {
    "storage": StorageConfig,
    "cluster": ClusterConfig,
    "render": RenderConfig,
    "source": SourceConfig,
    "split": SplitConfig,
    "vision": VisionConfig,
    "prepare": PrepareConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "augment": AugmentConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateConfig,
    "gates": GatesConfig,
    "score": ScoreConfig,
}
"""Every table that a recipe may hold."""


class Job(BaseSettings):
    """The sections that one job reads. Build one with `load`, or directly in code and tests."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        env_prefix="AGR_RAY_",
        env_nested_delimiter="__",
    )
    required: ClassVar[Sequence[str]] = ()
    """Dotted keys that have no default that could work."""

    storage: StorageConfig = StorageConfig()
    cluster: ClusterConfig = ClusterConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  # the library's signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read nothing but what the caller passes: `parse` adds the environment itself, below the command line."""
        return (init_settings,)


class RenderJob(Job):
    """Render synthetic faces with known labels: chips to train on, and whole photographs to score."""

    required = ("render.out",)
    render: RenderConfig = RenderConfig()


class PrepareJob(Job):
    """Labelled photographs -> aligned face crops in Parquet, one row for every input, with its split."""

    required = ("source.uri", "prepare.out")
    source: SourceConfig = SourceConfig()
    split: SplitConfig = SplitConfig()
    vision: VisionConfig = VisionConfig()
    prepare: PrepareConfig = PrepareConfig()


class TrainJob(Job):
    """Train a multi-task network on a prepared set. Run the same command again to resume a run that died."""

    required: ClassVar[Sequence[str]] = ("train.data",)
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    predict: PredictConfig = PredictConfig()
    new_run: CliImplicitFlag[bool] = False
    """Start anew where a run of this name has finished: the number of the run is added to the name."""
    dry_run: CliImplicitFlag[bool] = False
    """Print the plan, an estimate of memory and, after 20 steps in this process, of time; train and write nothing."""

    @model_validator(mode="after")
    def _batch_is_large_enough(self) -> Self:
        if self.train.batch_size < 2 * self.train.max_workers * self.train.accumulate:
            parts = f" and train.accumulate {self.train.accumulate}" if self.train.accumulate > 1 else ""
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is too small for train.num_workers "
                f"{self.train.max_workers}{parts}: each needs two images a step, for batch normalisation"
            )
        return self

    @model_validator(mode="after")
    def _has_a_share_for_each_set(self) -> Self:
        # Not in TrainConfig, because a recipe may hold the shares of sets that the command line names.
        shares, uris = list(self.train.data_shares), self.train.data_uris
        if shares and len(uris) == 1:
            raise ValueError(
                f"train.data_shares {shares} needs several sets in train.data, which is {self.train.data!r}"
            )
        if shares and len(shares) != len(uris):
            raise ValueError(f"train.data_shares {shares} must have a number for each of the {len(uris)} in train.data")
        return self

    @model_validator(mode="after")
    def _sides_end_at_the_models(self) -> Self:
        sides = self.train.input_sides_px
        if sides and sides[-1] != self.model.input_side_px:
            raise ValueError(
                f"train.input_sides_px {list(sides)} must end with model.input_side_px {self.model.input_side_px}"
            )
        return self


class TuneJob(TrainJob):
    """Search for better settings: train under different ones, stop what falls behind, keep the best.

    What is searched is in the recipe's [tune.space]; jobs/recipes/tune_lite.toml is an example. Each trial is a
    training run in OUT/NAME/trials. In OUT/NAME the sweep ends with best.toml, a recipe for jobs/train.py; best/, the
    checkpoint; trials.parquet, a row for each trial; and sweep.html, a page that says what mattered. Run the same
    command again to resume a sweep that was killed; --add 20 makes 20 more trials of one that has finished.
    """

    required = ("train.data", "tune.space")
    vision: VisionConfig = VisionConfig()
    """Not used: passed on into best.toml, which scoring needs it from."""
    tune: TuneConfig = TuneConfig()
    add: Annotated[int, Field(ge=0, le=MAX_INT)] = 0
    """Trials more, of a sweep that has finished; 0: none."""


class EvaluateJob(Job):
    """Measure a checkpoint on a split of any prepared set, beside majority and median baselines."""

    required = ("evaluate.checkpoint", "evaluate.data")
    predict: PredictConfig = PredictConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


class ScoreJob(Job):
    """Score every face of every photograph below a folder or bucket prefix: one Parquet row an image."""

    required = ("score.checkpoint", "score.input", "score.out")
    vision: VisionConfig = VisionConfig()
    predict: PredictConfig = PredictConfig()
    gates: GatesConfig = GatesConfig()
    score: ScoreConfig = ScoreConfig()


J = TypeVar("J", bound=Job)
_PREFIX = "agr_ray_"
_LONGEST_SHOWN = 100
"""Maximum length of a rejected value in a message, in characters."""


class _Parser(argparse.ArgumentParser):
    """Argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flag = unknown.split()[0].partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            message = f"{flag}: there is no such option{_did_you_mean(flag, known)}"
        print(f"error: {one_line(message)} (--help lists every option)", file=sys.stderr)
        raise SystemExit(2)


def read_local(path: str, storage: StorageConfig) -> bytes:  # noqa: ARG001  # as other readers
    """Return the bytes of a recipe on the local disk.

    Raises:
        ConfigError: the file can't be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: {getattr(error, 'strerror', error)}") from None


Reader = Callable[[str, StorageConfig], bytes]
"""Reads a recipe, given its path or URI and the storage settings. Raises ConfigError."""


def load(job: type[J], argv: Sequence[str], environ: Mapping[str, str] = os.environ, read: Reader = read_local) -> J:
    """Build a job's configuration, or print one line on stderr and exit with status 2.

    Args:
        job: the class to build.
        argv: the command line, without the program's name.
        environ: the environment; only variables that begin with `AGR_RAY_` are read.
        read: reads the recipe.
    """
    try:
        return parse(job, argv, environ, read)
    except ConfigError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(job: type[J], argv: Sequence[str], environ: Mapping[str, str] = os.environ, read: Reader = read_local) -> J:
    """Do what `load` does, but raise `ConfigError` instead of exiting (bad options and `--help` still exit)."""
    parser = _Parser(
        usage="%(prog)s [--config FILE] [--SECTION.KEY VALUE ...]",
        description=job.__doc__,
        epilog="Lists and tables are written as JSON: --model.tasks '[\"age\"]'. Environment variables: "
        "AGR_RAY_SECTION__KEY. Paths are local, file:// or s3://.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="path or URI of a recipe, a TOML file of [section] tables, which is read first; the storage settings for "
        "reading it come from the command line and the environment",
    )
    source: CliSettingsSource[Any] = CliSettingsSource(
        job,
        root_parser=parser,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_use_class_docs_for_groups=True,
        cli_implicit_flags=False,
        cli_shortcuts={"evaluate.calibrate": "calibrate"},
    )
    arguments = parser.parse_args([_underscored(argument) for argument in argv])
    try:
        from_environment = _read_environment(environ, job)
        try:
            from_command_line = source(parsed_args=arguments)()
        except SettingsError as error:
            raise ConfigError(redacted(str(error).splitlines()[0], environ=environ)) from None
        above = _merged(from_environment, from_command_line)
        storage = StorageConfig(**above.get("storage", {})) if arguments.config else StorageConfig()
        built = job(**_merged(_read_recipe(arguments.config, job, storage, read), above))
    except ValidationError as error:
        raise ConfigError(redacted(_describe(error, job), environ=environ)) from None
    for key in job.required:
        section, _, field = key.partition(".")
        if not getattr(getattr(built, section), field):
            raise ConfigError(f"{key} is needed: {_help_of(job, section, field)} Give --{key} or set it in the recipe.")
    return built


def digest(*sections: BaseModel, length: int = 12) -> str:
    """Return the first hex digits of the SHA-256 of the sections' canonical JSON."""
    text = json.dumps([section.model_dump(mode="json") for section in sections], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _underscored(argument: str) -> str:
    """Let `--new-run` and `--train.batch-size` be written with either dash."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    negation = "no-" if name.startswith("no-") else ""  # argparse's own
    return f"--{negation}{name.removeprefix('no-').replace('-', '_')}{equals}{value}"


def one_line(text: str) -> str:
    """Return a message as the one line that ends a job, without passwords."""
    return redacted(" ".join(text.split()))


_EVERY_SECTION = create_model(
    "_EverySection",
    __base__=BaseModel,
    **cast(Any, {name: (section, section()) for name, section in SECTIONS.items()}),
)
_EVERY_JOB: Sequence[type[Job]] = (RenderJob, PrepareJob, TuneJob, EvaluateJob, ScoreJob)
_FLAGS: Mapping[str, Any] = {
    name: (field.annotation, field)
    for each in _EVERY_JOB
    for name, field in each.model_fields.items()
    if name not in SECTIONS
}
"""Settings of jobs outside any section, such as new_run."""
_EVERYTHING = create_model("_Everything", __base__=_EVERY_SECTION, **cast(Any, _FLAGS))
"""Everything that an environment variable may set, in any job."""


def _read_environment(environ: Mapping[str, str], job: type[Job]) -> dict[str, Any]:
    """Return the values that our environment variables set for this job; check those for other jobs too.

    Raises:
        ConfigError: a variable names no setting of any job, is not JSON although JSON is required, or has an invalid
            value.
    """
    values: dict[str, Any] = {}
    for name, value in environ.items():
        if name.lower().startswith(_PREFIX):
            values = _merged(values, _read_variable(name, value))
    others = {name: value for name, value in values.items() if name not in job.model_fields}
    try:
        _EVERYTHING(**others)
    except ValidationError as error:
        raise ConfigError(redacted(_describe(error, _EVERYTHING), environ=environ)) from None
    return {name: value for name, value in values.items() if name in job.model_fields}


def _read_variable(name: str, value: str) -> dict[str, Any]:
    """Return what one variable sets."""
    top, _, below = name.lower().removeprefix(_PREFIX).partition("__")
    known = list(_EVERYTHING.model_fields)
    if top not in known:
        raise ConfigError(f"{name}: there is no section {top}{_did_you_mean(top, known)}; allowed: {', '.join(known)}")
    if top in SECTIONS and not below:
        # Whole sections are never shown, because any part of them may be a password.
        try:
            section = json.loads(value)
        except ValueError:
            section = None
        if not isinstance(section, dict):
            raise ConfigError(
                f"{name}: its value is not a JSON object; a whole section is written as one, such as "
                f'{{"key": "value"}}; {name}__KEY sets one key'
            )
        return {top: section}
    if below and top not in SECTIONS:
        raise ConfigError(f"{name}: {top} has no keys; set {_PREFIX.upper()}{top.upper()}")
    source = EnvSettingsSource(
        cast(Any, _EVERYTHING), env_prefix=_PREFIX.upper(), env_nested_delimiter="__", env_parse_none_str=""
    )
    source.env_vars = {name.lower(): value}
    try:
        return source()
    except SettingsError:
        raise ConfigError(
            f"{name}: {redacted(value)!r} is not JSON; lists and tables are written as JSON, such as '[\"age\"]'"
        ) from None


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _read_recipe(path: str | None, job: type[Job], storage: StorageConfig, read: Reader) -> dict[str, Any]:
    """Return the recipe's values for this job; check the sections that belong to other jobs."""
    if path is None:
        return {}
    try:
        recipe = tomllib.loads(read(path, storage).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not valid TOML: {redacted(str(error))}") from None
    for name, values in recipe.items():
        if name not in SECTIONS:
            hint = _did_you_mean(name, list(SECTIONS))
            raise ConfigError(f"{path}: there is no section [{name}]{hint}; allowed: {', '.join(SECTIONS)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {name} must be a table: [{name}]")
        if name not in job.model_fields:
            try:
                SECTIONS[name](**values)
            except ValidationError as error:
                raise ConfigError(f"{path}: {redacted(_describe(error, SECTIONS[name], prefix=name))}") from None
    return {name: values for name, values in recipe.items() if name in job.model_fields}


def _describe(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Say the first of pydantic's complaints in one line: key, value, what is allowed."""
    first = error.errors(include_url=False)[0]
    path = [part for part in ([prefix] if prefix else []) + [str(part) for part in first["loc"]] if part]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        owner = SECTIONS[path[0]] if len(path) > 1 and path[0] in SECTIONS else model
        owner = ParameterConfig if path[:2] == ["tune", "space"] else owner
        known = list(owner.model_fields)
        return f"{key}: there is no such key{_did_you_mean(path[-1], known)}; allowed: {', '.join(known)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    message = message[:1].lower() + message[1:]
    return f"{key}: {_shown(first['input'])} is not allowed: {message}"


def _shown(value: Any) -> str:
    """Return a rejected value as messages show it. Tables are hidden, because they may hold a password."""
    if isinstance(value, dict):
        return "a table"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _help_of(job: type[Job], section: str, field: str) -> str:
    model = job.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return " ".join((model.model_fields[field].description or "").split())


assert set(SPLITS) | {"all"} == {"train", "val", "test", "all"}
