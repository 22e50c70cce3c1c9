"""A contour of an objective over two parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from agr_ray.report.axis import fence, scale_numbers, short, span
from agr_ray.report.panel import COLOURS, panel
from agr_ray.report.trial_rows import TrialRow, is_known, judged

MIN_NEAR: Final = 3.0
"""Sum of the trials' weights, each at most 1, that a grid point needs to be coloured."""
_MAP = "viridis"


def contour_svg(
    trials: Sequence[TrialRow],
    pair: tuple[str, str],
    logarithmic: frozenset[str],
    best_number: int | None,
    name: str,
) -> str:
    """Draw the objective over two numeric parameters: a dot for each trial, and colour where enough trials are near."""
    rows = [row for row in judged(trials) if all(is_known(row, param) for param in pair)]
    with panel(name, height_inches=2.9) as (axes, done):
        points = np.array([[float(row.params[param]) for param in pair] for row in rows]).reshape(-1, 2)
        values = np.array([row.objective for row in rows], np.float64)
        top = fence([float(value) for value in values])
        scale = Normalize(float(values.min()), max(top, float(values.min()) + 1e-9))
        is_log = [param in logarithmic and bool((points[:, axis] > 0).all()) for axis, param in enumerate(pair)]
        filled = smoothed(points, np.minimum(values, top), is_log)
        if filled is not None:
            axes.contourf(*filled, levels=8, cmap=_MAP, norm=scale, alpha=0.55)
        shown = axes.scatter(
            points[:, 0],
            points[:, 1],
            c=values,
            cmap=_MAP,
            norm=scale,
            s=22,
            edgecolors=COLOURS["ink"],
            linewidths=0.6,
        )
        best = [row.number == best_number for row in rows]
        if any(best):
            axes.scatter(
                points[best, 0], points[best, 1], s=130, facecolors="none", edgecolors=COLOURS["ink"], linewidths=1.8
            )
        bar = axes.figure.colorbar(shown, ax=axes, label="objective", extend="max" if values.max() > top else "neither")
        bar.outline.set_visible(False)
        axes.set_xlabel(short(pair[0], 40))
        axes.set_ylabel(short(pair[1], 28))
        for place, log in enumerate(is_log):
            low, high = float(points[:, place].min()), float(points[:, place].max())
            ends = np.exp(span(math.log(low), math.log(high))) if log else span(low, high)
            (axes.set_ylim if place else axes.set_xlim)(*ends)
            scale_numbers(axes, axes.yaxis if place else axes.xaxis, log)
    return done[0]


def smoothed(
    points: NDArray[np.float64], values: NDArray[np.float64], is_log: Sequence[bool], side: int = 72
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None:
    """Return a grid's x, y and a weighted mean of the values around each grid point, masked where too few are near.

    Weights are Gaussian in distance, with the points scaled to the unit square and Scott's bandwidth.

    Args:
        points: (n, 2).
        values: (n,) finite.
        is_log: of x and of y, whether distances are measured between logarithms.
        side: grid points along each axis.

    Returns:
        None if fewer than four grid points have `MIN_NEAR` trials nearby, or an axis has only one value.
    """
    scaled = np.stack([np.log(x) if log else x for x, log in zip(points.T, is_log, strict=True)], axis=1)
    low, span = scaled.min(axis=0), np.ptp(scaled, axis=0)
    if (span <= 0.0).any():
        return None
    unit = (scaled - low) / span
    width = max(float(unit.std(axis=0).mean()) * len(unit) ** (-1.0 / 6.0), 0.02)
    places = np.linspace(0.0, 1.0, side)
    grid = np.stack(np.meshgrid(places, places), axis=-1)
    weights = np.exp(-0.5 * ((grid[:, :, None, :] - unit) ** 2).sum(axis=-1) / width**2)
    total = weights.sum(axis=-1)
    if (total >= MIN_NEAR).sum() < 4:
        return None
    mean = np.ma.masked_where(total < MIN_NEAR, (weights @ values) / np.maximum(total, 1e-12))
    axes = [np.exp(low[k] + places * span[k]) if is_log[k] else low[k] + places * span[k] for k in range(2)]
    return axes[0], axes[1], mean
