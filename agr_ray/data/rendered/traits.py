"""From labels to the looks of a face: every cue is a number drawn around a mean that depends on the labels.

No single cue reveals its label: each is drawn with an error of its own, so the cues of different labels overlap, and
only all cues together identify a label. Age enters each cue as an apparent age, gender as an apparent masculinity, race
as the mean of the cue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from agr_ray.labels import GENDERS, UTKFACE

RenderedArray = npt.NDArray[np.float32]

AGE_FIRST_YEARS: Final = 5
AGE_LAST_YEARS: Final = 100
"""Ages of rendered faces are whole years in this closed range."""


@dataclass(frozen=True)
class Labels:
    """The labels of a face."""

    age_years: float
    gender: str
    race: str


@dataclass(frozen=True)
class Traits:
    """The looks of one face. Lengths are in distances between the eyes, colours RGB in 0..1, strengths mostly 0..1."""

    skin: RenderedArray
    skin_roughness: float
    age_spots: float
    chin_y: float
    face_width: float
    cheek_fullness: float
    jaw_width: float
    jowls: float
    eye_size: float
    eye_aperture: float
    eye_tilt: float
    eye_fold: float
    socket_depth: float
    eye_bags: float
    lashes: float
    iris: RenderedArray
    brow_thickness: float
    brow_height: float
    brow_arch: float
    nose_width: float
    nose_y: float
    mouth_y: float
    mouth_width: float
    blush: float
    lip_thickness: float
    lip_redness: float
    wrinkle_age_years: float
    crow_age_years: float
    fold_age_years: float
    hair: RenderedArray
    brow_colour: RenderedArray
    greyness: float
    curl: float
    hair_length: float
    hair_volume: float
    hairline_y: float
    temple_recession: float
    thinning: float
    beard: float
    ear_length: float


@dataclass(frozen=True)
class _RaceMeans:
    """Mean of each cue of a race; the errors around them are in `draw_traits`."""

    melanin: float
    yellowness: float
    eye_aperture: float
    eye_tilt: float
    eye_fold: float
    socket_depth: float
    nose_width: float
    lip_thickness: float
    curl: float
    hair: tuple[float, float, float]
    iris: tuple[float, float, float]
    brow_thickness: float
    brow_arch: float
    face_width: float


_RACE_MEANS: Final = {
    "white": _RaceMeans(
        0.10, -0.5, 1.02, 0.00, 1.0, 0.90, 0.84, 0.78, 0.18, (0.55, 0.38, 0.20), (0.36, 0.54, 0.72), 0.90, 0.5, 0.97
    ),
    "black": _RaceMeans(
        0.90, 0.0, 1.05, 0.02, 0.7, 0.50, 1.36, 1.50, 1.00, (0.09, 0.07, 0.06), (0.20, 0.12, 0.08), 1.05, 0.4, 1.01
    ),
    "asian": _RaceMeans(
        0.20, 0.8, 0.66, 0.15, 0.1, 0.15, 1.08, 0.95, 0.00, (0.08, 0.07, 0.08), (0.22, 0.13, 0.08), 0.80, 0.0, 1.06
    ),
    "indian": _RaceMeans(
        0.57, 0.5, 1.12, 0.03, 0.9, 1.45, 0.98, 1.10, 0.15, (0.08, 0.06, 0.05), (0.24, 0.14, 0.07), 1.50, 0.9, 0.97
    ),
    "others": _RaceMeans(
        0.42, -0.2, 0.98, 0.00, 0.6, 0.55, 1.16, 1.22, 0.55, (0.42, 0.18, 0.08), (0.36, 0.58, 0.20), 1.10, 0.4, 1.00
    ),
}

_SKIN_BY_MELANIN: Final = np.array(
    [
        [0.97, 0.82, 0.75],
        [0.93, 0.75, 0.63],
        [0.80, 0.59, 0.45],
        [0.58, 0.39, 0.28],
        [0.36, 0.23, 0.17],
        [0.26, 0.16, 0.12],
    ]
)
_GREY_HAIR: Final = np.array([0.82, 0.82, 0.83])


def draw_labels(rng: np.random.Generator) -> Labels:
    """Draw age, gender and race independently, each uniformly."""
    return Labels(
        age_years=float(rng.integers(AGE_FIRST_YEARS, AGE_LAST_YEARS + 1)),
        gender=GENDERS[rng.integers(len(GENDERS))],
        race=UTKFACE.races[rng.integers(len(UTKFACE.races))],
    )


def draw_traits(labels: Labels, rng: np.random.Generator) -> Traits:
    """Draw the looks of a face with these labels."""
    means = _RACE_MEANS[labels.race]
    sign = 1.0 if labels.gender == "male" else -1.0

    def age(error_years: float) -> float:
        return labels.age_years + error_years * float(rng.standard_normal())

    def male(error: float = 0.7) -> float:
        return sign + error * float(rng.standard_normal())

    def near(mean: float, error: float) -> float:
        return mean + error * float(rng.standard_normal())

    adult = _ramp(age(2.0), 4, 24)  # jaws and brows of girls and boys differ little
    bones = 0.35 + 0.65 * adult
    greyness = _ramp(age(3.5), 26, 100)
    skin = _skin(near(means.melanin, 0.07), near(means.yellowness, 0.28))
    hair = np.clip(np.array(means.hair) * near(1.0, 0.22) + 0.01 * rng.standard_normal(3), 0.02, 0.9)
    iris = np.clip(np.array(means.iris) * near(1.0, 0.15) + 0.03 * rng.standard_normal(3), 0.03, 0.9)
    beard_age = age(2.0)
    beard = float(rng.beta(1.3, 1.2)) if sign > 0 and rng.random() < 0.7 else 0.12 * float(rng.random())
    beard *= _ramp(beard_age, 14, 24)
    thin = _ramp(age(6.0), 25, 100)

    return Traits(
        skin=skin,
        skin_roughness=_ramp(age(4.0), 15, 100),
        age_spots=_ramp(age(5.0), 35, 100),
        chin_y=1.36 + 0.25 * _ramp(age(1.8), 3, 26) + 0.05 * bones * male(),
        face_width=near(means.face_width, 0.025),
        cheek_fullness=1.0 - 0.85 * _ramp(age(3.0), 3, 30) - 0.35 * _ramp(age(6.0), 30, 100),
        jaw_width=near(0.50, 0.12) + 0.36 * bones * male() + 0.1 * (1 - adult),
        jowls=_ramp(age(4.0), 30, 100),
        eye_size=1.42 - 0.37 * _ramp(age(2.5), 3, 28) - 0.15 * _ramp(age(6.0), 28, 100) - 0.02 * male(),
        eye_aperture=max(near(means.eye_aperture, 0.08) * (1.0 - 0.28 * _ramp(age(5.0), 30, 100)), 0.4),
        eye_tilt=near(means.eye_tilt, 0.03) - 0.04 * _ramp(age(6.0), 30, 100),
        eye_fold=float(np.clip(near(means.eye_fold, 0.2), 0, 1.3)),
        socket_depth=float(np.clip(near(means.socket_depth, 0.22), 0, 2)),
        eye_bags=_ramp(age(3.5), 18, 100),
        lashes=float(np.clip(0.5 - 0.45 * male(), 0, 1.4)),
        iris=iris.astype(np.float32),
        brow_thickness=max(
            near(means.brow_thickness, 0.13) * (1.0 + 0.33 * male()) * (0.65 + 0.35 * _ramp(age(3.0), 3, 25)), 0.3
        ),
        brow_height=-0.345 + 0.055 * male() + 0.03 * _ramp(age(6.0), 30, 100),
        brow_arch=near(means.brow_arch, 0.2) - 0.25 * male(),
        nose_width=near(means.nose_width, 0.09) * (0.80 + 0.20 * adult) * (1 + 0.05 * male()),
        nose_y=0.48 + 0.10 * _ramp(age(2.5), 3, 26) + 0.07 * _ramp(age(6.0), 30, 100),
        mouth_y=0.89 + 0.11 * _ramp(age(2.5), 3, 26) + 0.05 * _ramp(age(6.0), 30, 100),
        mouth_width=near(0.335, 0.012) + 0.06 * _ramp(age(2.5), 3, 26) + 0.03 * _ramp(age(6.0), 30, 100),
        blush=0.08 + 0.5 * (1 - _ramp(age(3.0), 3, 32)),
        lip_thickness=max(near(means.lip_thickness, 0.12) * (1 - 0.42 * _ramp(age(5.0), 25, 100)) - 0.12 * male(), 0.3),
        lip_redness=float(np.clip(0.5 - 0.45 * male(), -0.3, 1.5)),
        wrinkle_age_years=age(3.0),
        crow_age_years=age(3.0),
        fold_age_years=age(3.0),
        hair=_greyed(hair, greyness),
        brow_colour=_greyed(hair * 0.8, 0.85 * _ramp(age(4.0), 30, 100)),
        greyness=greyness,
        curl=float(np.clip(near(means.curl, 0.13), 0, 1.2)),
        hair_length=float(np.clip(0.78 - 0.78 * male(0.65), -0.3, 1.85)),
        hair_volume=near(0.24, 0.04) + 0.05 * means.curl,
        hairline_y=near(-0.60, 0.04) - 0.10 * thin * (1.2 + 0.6 * sign),
        temple_recession=0.30 * _ramp(age(6.0), 22, 95) * (0.9 + 0.5 * sign),
        thinning=float(np.clip(thin * (0.45 + 0.25 * sign) + 0.1 * rng.standard_normal(), 0, 0.9)),
        beard=beard,
        ear_length=0.26 + 0.06 * _ramp(age(4.0), 3, 25) + 0.10 * _ramp(age(6.0), 30, 100),
    )


def _ramp(value: float, first: float, last: float) -> float:
    """Rise linearly from 0 at `first` to 1 at `last`."""
    return min(max((value - first) / (last - first), 0.0), 1.0)


def _skin(melanin: float, yellowness: float) -> RenderedArray:
    places = np.linspace(0, 1, len(_SKIN_BY_MELANIN))
    rgb = np.array([np.interp(melanin, places, channel) for channel in _SKIN_BY_MELANIN.T])
    tint = 1 + yellowness * np.array([-0.01, 0.03, -0.12])
    return np.clip(rgb * tint, 0.05, 1).astype(np.float32)


def _greyed(rgb: npt.NDArray[np.float64], greyness: float) -> RenderedArray:
    return (rgb + greyness * (_GREY_HAIR - rgb)).astype(np.float32)
