"""Settings of training: the loss, the augmentation and the run."""

from __future__ import annotations

import json
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
    Section,
    Seed,
    Timeout,
)


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
    data_shares: tuple[PositiveFloat, ...] = ()
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
    gpus_per_worker: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """`use_gpu` only: share of a GPU that Ray reserves for the worker. With 0.5 two runs of one worker each, such as
    trials of a sweep, take one GPU together, if its memory holds both. Less than 1 needs num_workers 1."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs that Ray reserves for a worker."""
    threads_per_worker: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Threads that a worker computes with; none: the machine's CPUs shared out among its workers."""
    batch_size: Annotated[int, Field(gt=0, le=2**20)] = 32
    """Images in one optimiser step over all workers together."""
    grad_accum_steps: PositiveInt = 1
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
    """Factor of the learning rate for each stage of the backbone, counted from the heads, which learn at the full rate:
    the last stage at lr * this, the one before at lr * this^2. A stage begins where the image gets smaller. 1: off."""
    freeze_epochs: Annotated[int, Field(ge=0, le=MAX_INT)] = 0
    """Epochs at the beginning in which only the heads learn: the backbone's weights and running statistics stay fixed.
    Only useful with pretrained weights (model.pretrained). 0: none; epochs: throughout."""
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
    grad_clip_norm: NonNegativeFloat = 0.0
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
    or more; a smaller last batch or another of image_sizes compiles once more, then for any size."""
    sync_batch_norm: bool = False
    """Batch norm over the batches of all workers at once, two exchanges more for each layer: for shares of batch_size
    that are too small for statistics, about 8 and less. Needs use_gpu."""
    image_sizes: tuple[Annotated[int, Field(ge=32, le=1024)], ...] = ()
    """Progressive resizing: sides of the network's input, pixels, in equal shares of the epochs, such as [48, 64, 88].
    Small ones are quick. The last must be model.image_size. Empty: that throughout."""
    balance: Literal["none", "age", "gender", "race", "cells"] = "none"
    """Draw training rows, with replacement, so that age groups (0-10, 11-20 and so on), genders, races or the cells of
    all three come evenly. Rows without the label keep their share. It needs each worker's crops in memory (cache_mib):
    the epoch that first streams them there, of a run and after each resume, comes as it is. `none`: each row once."""
    balance_power: Fraction = 1.0
    """`balance` only: a row is drawn by (rows that share its label) to minus this: 1 evens out, 0 not at all."""
    use_fallback: bool = True
    """Whether chips in which no face was found are trained on. They are always evaluated."""
    early_stopping_patience: Annotated[int, Field(ge=0, le=MAX_INT)] = 10
    """Stop after so many epochs without a better objective on validation; 0: never."""
    seed: Seed = 0
    """Seed of first weights, shuffling and augmentation."""
    max_failures: Annotated[int, Field(ge=-1, le=MAX_INT)] = 3
    """Times that a failed worker group is started again from the last checkpoint; -1: without end."""
    outage_s: Annotated[float, Field(ge=0.0, le=1e6)] = 300.0
    """Seconds to wait for storage that is unavailable, or for a cluster that has become too small."""
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
        if self.schedule == "plateau" and 0 < self.early_stopping_patience <= self.plateau_epochs:
            raise ValueError(
                f"plateau_epochs {self.plateau_epochs} must be less than early_stopping_patience "
                f"{self.early_stopping_patience} (0: never stop), or training stops before the first cut"
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
