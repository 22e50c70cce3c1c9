"""Functions of training progress: steps, image sizes, learning rates, seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from agr_ray.config import TrainConfig

_WARMUP_START = 1.0 / 25.0
_ONE_CYCLE_END = 1.0 / 25.0e4


def steps_per_epoch(num_train_rows: int, config: TrainConfig) -> int:
    """Return the number of optimiser steps in one epoch over the rows of all ranks."""
    return max(1, math.ceil(num_train_rows / config.batch_size))


def epoch_side_px(epoch: int, config: TrainConfig, side_px: int) -> int:
    """Return the side of the network's input in an epoch, for training and validation, pixels.

    Args:
        epoch: number of the epoch, from 1.
        config: its `image_sizes` are used in equal shares of its `epochs`.
        side_px: the model's image size, used if `image_sizes` is empty.
    """
    sides = config.image_sizes or (side_px,)
    return sides[-1 - (config.epochs - epoch) * len(sides) // config.epochs]


def epoch_seed(seed: int, epoch: int, rank: int, steps_done: int) -> int:
    """Return the seed of a rank's random numbers in an epoch, or in the rest of one that resumes after `steps_done`."""
    return int(np.random.SeedSequence([seed, epoch, rank, steps_done]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate(epochs_done: float, config: TrainConfig, num_cuts: int = 0) -> float:
    """Return the learning rate of the step that begins after `epochs_done` epochs, which may be a fraction.

    A function of progress alone, so a resumed run needs no scheduler state, and an epoch with one step more than
    expected shifts nothing.

    - `step`: multiplied by gamma every `step_size_epochs` (paper eq. 20).
    - `one_cycle`: rises from 1/25 of `lr` during the fraction `warmup` of the run, then falls to nearly 0, both along a
      cosine (Smith and Topin, arXiv 1708.07120).
    - `cosine`: rises linearly from 1/25 of `lr` during the fraction `warmup`, then falls to 0 along a cosine.
    - `plateau`: multiplied by gamma for each of the `num_cuts` that `plateau_cuts` counts.
    """
    progress = min(max(epochs_done / config.epochs, 0.0), 1.0)
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "step":
        # Rounded, because a sum of fractions may be slightly below the whole number.
        factor = config.gamma ** int(round(epochs_done, 6) // config.step_size_epochs)
    elif config.schedule == "plateau":
        factor = config.gamma**num_cuts
    elif config.schedule == "one_cycle":
        if progress < config.warmup:
            factor = _cosine(_WARMUP_START, 1.0, progress / config.warmup)
        else:
            factor = _cosine(1.0, _ONE_CYCLE_END, _share(progress - config.warmup, 1.0 - config.warmup))
    elif progress < config.warmup:
        factor = _WARMUP_START + (1.0 - _WARMUP_START) * progress / config.warmup
    else:
        factor = _cosine(1.0, 0.0, _share(progress - config.warmup, 1.0 - config.warmup))
    return config.lr * factor


def plateau_cuts(objectives: Iterable[float | None], config: TrainConfig) -> int:
    """Count how often `plateau` has reduced the learning rate after epochs with these validation objectives.

    Each reduction follows `plateau_epochs` epochs in a row without a new best. Epochs whose objective is None, because
    validation has no labelled row, are ignored.
    """
    best, num_stale, num_cuts = math.inf, 0, 0
    for score in objectives:
        if score is None:
            continue
        num_stale = 0 if score < best else num_stale + 1
        best = min(score, best)
        if num_stale == config.plateau_epochs:
            num_stale, num_cuts = 0, num_cuts + 1
    return num_cuts


def _cosine(start: float, end: float, share: float) -> float:
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * share))


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 1.0
