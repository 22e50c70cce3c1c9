"""What follows from how far training is: steps, image sizes, learning rates, seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from agr_ray.config import TrainConfig

_WARMUP_START = 1.0 / 25.0
_ONE_CYCLE_END = 1.0 / 25.0e4


def steps_per_epoch(num_train_rows: int, config: TrainConfig) -> int:
    """Return the optimiser steps of one epoch over the rows of all ranks."""
    return max(1, math.ceil(num_train_rows / config.batch_size))


def epoch_side_px(epoch: int, config: TrainConfig, side_px: int) -> int:
    """Return the side of the images that an epoch, from 1, is trained and validated on, pixels.

    Args:
        epoch: which.
        config: `image_sizes` in equal shares of `epochs`.
        side_px: the model's, which is that of all epochs where there are no others.
    """
    sides = config.image_sizes or (side_px,)
    return sides[-1 - (config.epochs - epoch) * len(sides) // config.epochs]


def epoch_seed(seed: int, epoch: int, rank: int, steps_done: int) -> int:
    """Return the seed of the random numbers that a rank draws in an epoch, or in what is left of it after a resume."""
    return int(np.random.SeedSequence([seed, epoch, rank, steps_done]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate(epochs_done: float, config: TrainConfig, num_cuts: int = 0) -> float:
    """Return the learning rate of the step that begins after so many epochs, a fraction within one.

    It depends on progress alone, so a resumed run needs no state of it, and an epoch with one step more than
    planned does not shift it.

    `step`: times gamma each `step_size_epochs` (eq. 20). `one_cycle`: from 1/25 of `lr` up in the share
    `warmup` of the run, then down to nearly 0, both along a cosine (Smith and Topin, arXiv 1708.07120).
    `cosine`: straight up from 1/25 in the share `warmup`, then down to 0. `plateau`: times gamma for each
    of the `num_cuts` that `plateau_cuts` counts.
    """
    progress = min(max(epochs_done / config.epochs, 0.0), 1.0)
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "step":
        # Rounded, because a sum of fractions of epochs may end a hair before the whole number.
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
    """Count how often `plateau` has cut the learning rate after epochs with these objectives on validation.

    A cut comes after `plateau_epochs` epochs none of which was better than all before, and the next one not until
    as many more were not. None, an epoch without a labelled validation row, says nothing either way.
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
