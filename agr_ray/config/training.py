"""Settings of training: the loss, the augmentation and the run."""

from __future__ import annotations

import json
import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from agr_ray.config.section import (
    MAX_INT,
    Fraction,
    Name,
    NonNegativeFloat,
    OneOrSeveral,
    PositiveFloat,
    PositiveInt,
    Private,
    Section,
    Seed,
    Timeout,
)


class LossConfig(Section):
    """The loss is the sum of the tasks' losses, each with its weight (paper eqs 11 and 21)."""

    age_weight: NonNegativeFloat = 1.0
    """Weight of the age loss."""
    gender_weight: NonNegativeFloat = 0.5
    """Weight of the gender loss."""
    race_weight: NonNegativeFloat = 0.5
    """Weight of the race loss."""
    domain_weight: NonNegativeFloat = 0.1
    """Task `domain` only: factor of the reversed gradient that reaches the features. The domain loss has weight 1."""
    weighting: Literal["fixed", "uncertainty"] = "fixed"
    """`fixed`: the weights above, as in the paper; `uncertainty`: learnable weights, initialised to those above
    (Kendall et al. 2018). Reported losses always use the weights above."""
    age_loss: Literal["l1", "mse", "huber"] = "l1"
    """Age heads `linear` and `distribution` only: loss of the error e in years. `l1` is |e| (paper eq. 12); `mse` is
    e^2 (its eq. 26); `huber` is e^2 / 2 up to huber_delta_years d, and d (|e| - d / 2) beyond."""
    huber_delta_years: PositiveFloat = 1.0
    """`huber` only: error above which the loss grows linearly, years."""
    age_scale_years: PositiveFloat = 1.0
    """Age heads `linear` and `distribution` only: unit of the age error, years. It divides an `l1` loss; its square
    divides `mse` and `huber`."""
    age_sigma_years: PositiveFloat = 2.0
    """`distribution` head only: standard deviation of the Gaussian target, years (DLDL-v2)."""
    age_expectation_weight: NonNegativeFloat = 1.0
    """`distribution` head only: weight of the expectation's `age_loss`, added to the KL divergence."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Label smoothing: share of a label of gender, race or age group that is spread over all classes."""

    @model_validator(mode="after")
    def _has_positive_weights(self) -> Self:
        if self.weighting == "uncertainty":
            for key in ("age_weight", "gender_weight", "race_weight"):
                if getattr(self, key) == 0.0:
                    raise ValueError(f"{key} {getattr(self, key)} must be greater than 0 when weighting is uncertainty")
        return self


class AugmentConfig(Section):
    """Augmentation of training crops: random, different for every image and epoch, computed on the device."""

    flip_probability: Fraction = 0.5
    """Chance of a horizontal flip."""
    rotation_degrees: Annotated[float, Field(ge=0.0, le=180.0)] = 10.0
    """Rotation, uniform between minus and plus this."""
    scale: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Zoom factor, uniform between 1 - scale and 1 + scale; 0: none."""
    shift: Annotated[float, Field(ge=0.0, le=0.5)] = 0.05
    """Shift in x and in y, uniform between minus and plus this fraction of the side: random cropping in the margin."""
    brightness: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Brightness factor drawn from 1 - this to 1 + this; 0: none."""
    contrast: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Contrast factor drawn from 1 - this to 1 + this; 0: none."""
    saturation: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Saturation factor drawn from 1 - this to 1 + this; 0: none."""
    low_resolution_probability: Fraction = 0.0
    """Chance that an image is shrunk, to 25 % of its side at the least, and enlarged again, as if its face were small
    in the photograph; 0: none."""
    noise_probability: Fraction = 0.0
    """Chance of sensor noise: Gaussian, with a standard deviation of up to 20 % of white; 0: none."""
    erasing_probability: Fraction = 0.0
    """Chance that a random rectangle of 2 to 20 % of the image is filled with the image's mean colour; 0: none."""
    randaugment_ops: Annotated[int, Field(ge=0, le=8)] = 0
    """RandAugment: operations drawn for each image out of 14 (shears, shifts, rotation, brightness, saturation,
    contrast, sharpness, posterisation, solarisation and so on), before all other augmentation; 0: none."""
    randaugment_magnitude: Annotated[float, Field(ge=0.0, le=30.0)] = 9.0
    """RandAugment's strength, the same for all operations: 0 to 30."""
    equalize: bool = False
    """Equalise the histogram of each crop's luminance (paper eq. 17); colour is kept. Not random: it is part of the
    network's input, stored in the checkpoint, and also applied in validation, evaluation and scoring."""
    mixup_alpha: NonNegativeFloat = 0.0
    """MixUp: blend each image with another of its batch, with a weight from Beta(this, this), and weight the losses of
    both labels alike; 0: none. With cutmix_alpha too, each is chosen with probability 1/2."""
    cutmix_alpha: NonNegativeFloat = 0.0
    """CutMix: replace a box of each image with one of another image; its area is drawn from Beta(this, this); 0:
    none."""


class TrainConfig(Section):
    """The training run."""

    data: OneOrSeveral = ""
    """Folder or prefix of a prepared set (written by `agr-ray prepare`), or several with the same crop_side_px, in a
    recipe ["data/utkface", "data/adience"]. Training and validation use all of them. A missing label adds
    nothing to the loss, so a set may have no race."""
    data_shares: tuple[PositiveFloat, ...] = ()
    """Several sets only: sampling weight of each set, with replacement: [3, 1] draws three rows of the first for one of
    the second. An epoch has as many rows as all sets together. Needs the crops in memory, like `balance`, and has no
    effect in the epoch that loads them. With it, `balance` works within each set. Empty: each row once."""
    out: str = "runs"
    """Folder or prefix of all runs; this one is written to OUT/NAME. Must be shared storage if there are several
    nodes."""
    name: Name = ""
    """Name of the run; empty: `train-` and a hash of the settings. The same name resumes the run."""
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Data-parallel processes, each with its own model replica and share of the batch; with a range such as 2-8, as
    many of them as fit the cluster (elastic training). In a recipe, a range is [2, 8]. When a node leaves or joins, the
    run resumes from its last checkpoint with the new number; a step still has batch_size images."""
    use_gpu: bool = False
    """Train on one GPU for each worker (NCCL); otherwise on the CPU (gloo)."""
    gpus_per_worker: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """`use_gpu` only: share of a GPU that Ray reserves for the worker. With 0.5, two single-worker runs, such as trials
    of a sweep, share a GPU if its memory is enough for both. Less than 1 requires num_workers 1."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs that Ray reserves for a worker."""
    threads_per_worker: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Compute threads of a worker; none: the machine's CPUs divided by its workers."""
    batch_size: Annotated[int, Field(gt=0, le=2**20)] = 32
    """Images in one optimiser step, over all workers together."""
    grad_accum_steps: PositiveInt = 1
    """Gradient accumulation: micro-batches in which a worker processes its share of batch_size, if its memory is too
    small for all of it. The gradient is the same, but batch norm sees micro-batches, which need two images each."""
    epochs: PositiveInt = 50
    """Maximum number of passes over the training data."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """The paper uses Adam (eq. 19)."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate of the schedule."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor of the learning rate for each stage of the backbone, counted from the heads, which have the full rate:
    the last stage at lr * this, the one before at lr * this^2. A stage begins where the resolution drops. 1: off."""
    freeze_epochs: Annotated[int, Field(ge=0, le=MAX_INT)] = 0
    """Number of first epochs in which only the heads learn; the backbone's weights and running statistics stay fixed.
    Only useful with pretrained weights (model.pretrained). 0: none; epochs: throughout."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay: L2 for adam and sgd, decoupled for adamw."""
    schedule: Literal["step", "one_cycle", "cosine", "plateau", "constant"] = "step"
    """`step` is that of Bosco and Chi (2025, eq. 20); `one_cycle` warms up and anneals over all epochs; `cosine`
    anneals; `plateau` reduces the rate when validation stops improving."""
    step_size_epochs: PositiveInt = 20
    """`step` only: epochs between two reductions of the learning rate."""
    plateau_epochs: PositiveInt = 5
    """`plateau` only: epochs without improvement on validation before the learning rate is reduced."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """`step` and `plateau` only: factor of each reduction."""
    warmup: Fraction = 0.3
    """`one_cycle` and `cosine`: fraction of all steps in which the learning rate rises."""
    grad_clip_norm: NonNegativeFloat = 0.0
    """Maximum gradient norm; larger gradients are scaled down; 0: no limit."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay per step of the exponential moving average of weights, which is validated and saved; 0: no average."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Data type of the forward and backward passes (autocast), while weights stay float32; auto: bfloat16 if the device
    supports it natively, else float32. float16 is for GPUs without bfloat16 (V100, T4) and requires use_gpu: the loss
    is scaled, and steps whose gradients overflow are skipped."""
    tf32: bool = True
    """Let a GPU use TF32 for float32 products: several times as fast (Ampere or newer), with 10-bit mantissas."""
    compile: bool = False
    """Compile the network for training (torch.compile). Needs a C++ compiler on every node. The first step takes a
    minute or more. A smaller last batch or a new image size triggers one recompilation, for dynamic shapes."""
    sync_batch_norm: bool = False
    """Synchronise batch-norm statistics across workers, which takes two more exchanges per layer; useful for about 8
    images or fewer per worker. Requires use_gpu."""
    image_sizes: tuple[Annotated[int, Field(ge=32, le=1024)], ...] = ()
    """Progressive resizing: sides of the network's input, pixels, in equal shares of the epochs, such as [48, 64, 88].
    Small images are faster. The last must be model.image_size. Empty: model.image_size throughout."""
    balance: Literal["none", "age", "gender", "race", "cells"] = "none"
    """Draw training rows with replacement so that age groups, genders, races or the cells of all three are equally
    frequent. Rows without the label keep their share. Needs each worker's crops in memory (cache_mib), so it has no
    effect in the first epoch of a run or after a resume, which loads them. `none`: each row once."""
    balance_power: Fraction = 1.0
    """`balance` only: a row's weight is (number of rows with its label) ** -this: 1 balances fully, 0 not at all."""
    use_fallback: bool = True
    """Train on chips in which no face was found. They are always evaluated."""
    early_stopping_patience: Annotated[int, Field(ge=0, le=MAX_INT)] = 10
    """Stop after this many epochs without improvement on validation; 0: never."""
    seed: Seed = 0
    """Seed of initial weights, shuffling and augmentation."""
    max_failures: Annotated[int, Field(ge=-1, le=MAX_INT)] = 3
    """Maximum restarts of a failed worker group from the last checkpoint; -1: no limit."""
    outage_s: Annotated[float, Field(ge=0.0, le=1e6)] = 300.0
    """Seconds to wait for storage that is unavailable, or for a cluster that has become too small."""
    lock_expiry_s: Timeout = 120.0
    """Seconds without a heartbeat after which the same command takes over the lock on the run from a driver that was
    killed on another machine. A driver killed on this machine is detected at once. The heartbeat interval is a quarter
    of it."""
    num_to_keep: PositiveInt = 1
    """Number of best checkpoints to keep in NAME/checkpoints, in addition to the last."""
    cache_mib: Annotated[int, Field(ge=0, le=MAX_INT)] = 4096
    """Memory in which each worker may keep its share of the decoded training crops, MiB; as much again for validation.
    If they fit, epochs from the second on read crops from there."""
    shuffle_rows: PositiveInt = 2048
    """Rows in each worker's shuffle buffer while crops are streamed. In memory, its whole share is shuffled."""
    mlflow_uri: Private = ""
    """MLflow tracking server for the run, such as http://HOST:5000; empty: none. Needs the package mlflow on every
    node."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _parse_num_workers(cls, value: object) -> object:
        """Accept `2-8`, and a list of one number."""
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        ends = re.fullmatch(r"(\d+)-(\d+)", value) if isinstance(value, str) else None
        return value if ends is None else (int(ends[1]), int(ends[2]))

    @property
    def min_workers(self) -> int:
        """Return the minimum number of workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Return the maximum number of workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def data_uris(self) -> tuple[str, ...]:
        """Return the prepared sets, one or several."""
        return tuple(json.loads(self.data)) if self.data.startswith("[") else (self.data,)

    @model_validator(mode="after")
    def _has_a_valid_range_of_workers(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers [{self.min_workers}, {self.max_workers}]: the minimum comes first")
        return self

    @model_validator(mode="after")
    def _reduces_before_it_stops(self) -> Self:
        if self.schedule == "plateau" and 0 < self.early_stopping_patience <= self.plateau_epochs:
            raise ValueError(
                f"plateau_epochs {self.plateau_epochs} must be less than early_stopping_patience "
                f"{self.early_stopping_patience} (0: never stop), or training stops before the first reduction"
            )
        return self

    @model_validator(mode="after")
    def _has_a_gpu_if_needed(self) -> Self:
        if self.precision == "float16" and not self.use_gpu:
            raise ValueError("precision float16 requires use_gpu; on a CPU: auto, float32, bfloat16")
        if self.sync_batch_norm and not self.use_gpu:
            raise ValueError("sync_batch_norm true requires use_gpu: torch supports it on GPUs only")
        if self.gpus_per_worker < 1.0 and (not self.use_gpu or self.max_workers > 1):
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g} needs use_gpu and num_workers 1: "
                "NCCL does not support two workers of a run on one GPU"
            )
        return self
