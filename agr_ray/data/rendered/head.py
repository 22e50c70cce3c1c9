"""Draw one head with numpy and OpenCV, as RGB and opacity on a canvas of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from agr_ray.data.rendered.canvas import Canvas, ellipse, smooth_curve
from agr_ray.data.rendered.hair import Hair
from agr_ray.data.rendered.traits import RenderedArray, Traits


@dataclass(frozen=True)
class Head:
    """A drawn head: `rgb` float32 3xHxW in 0..1 times `alpha` float32 HxW, and its geometry.

    `landmarks` (5, 2) in the order of `schema.LANDMARK_NAMES` and `box_xyxy` are in distances between the eyes;
    a canvas pixel is (x * scale_px + origin_px[0], y * scale_px + origin_px[1]).
    """

    rgb: RenderedArray
    alpha: RenderedArray
    scale_px: float
    origin_px: tuple[float, float]
    landmarks: RenderedArray
    box_xyxy: RenderedArray


@dataclass(frozen=True)
class Expression:
    """Expression of a face, drawn independently of its labels."""

    smile: float
    mouth_open: float
    gaze_x: float
    gaze_y: float
    turn: float


def draw_expression(rng: np.random.Generator) -> Expression:
    """Draw an expression at random."""
    return Expression(
        smile=float(rng.uniform(-0.2, 1.0)),
        mouth_open=float(max(rng.uniform(-0.6, 1.0), 0.0)),
        gaze_x=float(rng.uniform(-1, 1)),
        gaze_y=float(rng.uniform(-0.6, 0.6)),
        turn=float(rng.uniform(-1, 1)),
    )


def draw_head(traits: Traits, expression: Expression, rng: np.random.Generator, scale_px: float) -> Head:
    """Draw a head whose eyes are `scale_px` canvas pixels apart."""
    canvas = Canvas(scale_px, rng)
    outline = _face_outline(traits, expression)
    hair = Hair(canvas, traits, rng)
    hair.draw_back()
    _draw_neck(canvas, traits)
    _draw_ears(canvas, traits)
    _draw_skin(canvas, traits, expression, outline, rng)
    _draw_mouth(canvas, traits, expression)
    _draw_nostrils(canvas, traits, expression)
    _draw_beard(canvas, traits, expression, outline)
    for side in (-1, 1):
        _draw_eye(canvas, traits, expression, side)
        _draw_brow(canvas, traits, side)
    hair.draw_front()
    alpha = canvas.alpha * canvas.limit()
    turn = expression.turn
    corner_y = traits.mouth_y - 0.05 * expression.smile
    half_mouth = _half_mouth(traits, expression)
    landmarks = np.array(
        [
            [-0.5, 0.0],
            [0.5, 0.0],
            [0.09 * turn, traits.nose_y],
            [-half_mouth + 0.05 * turn, corner_y],
            [half_mouth + 0.05 * turn, corner_y],
        ],
        dtype=np.float32,
    )
    half_width = 0.98 * traits.face_width
    box = np.array([-half_width, -0.92, half_width, traits.chin_y], dtype=np.float32)
    return Head(canvas.rgb * alpha, alpha, scale_px, canvas.origin_px, landmarks, box)


def _half_mouth(traits: Traits, expression: Expression) -> float:
    return traits.mouth_width + 0.04 * expression.smile


def _face_outline(traits: Traits, expression: Expression) -> RenderedArray:
    width, chin_y = traits.face_width, traits.chin_y
    full, jaw, jowls = traits.cheek_fullness, traits.jaw_width, traits.jowls
    low = chin_y - 1.60
    right = [
        (0.62 * width, -1.10),
        (0.88 * width, -0.66),
        (0.965 * width, -0.15),
        ((0.95 + 0.04 * full) * width, 0.30),
        ((0.85 + 0.08 * full + 0.07 * jaw + 0.03 * jowls) * width, 0.78 + 0.4 * low),
        ((0.60 + 0.08 * full + 0.17 * jaw + 0.11 * jowls) * width, 1.20 + 0.7 * low),
        ((0.24 + 0.05 * full + 0.16 * jaw + 0.05 * jowls) * width, chin_y - 0.07),
    ]
    left = [(-x, y) for x, y in reversed(right)]
    points = [(0.0, -1.27), *right, (0.0, chin_y), *left]
    curve = smooth_curve(points, closed=True)
    curve[:, 0] += 0.04 * expression.turn * np.clip(curve[:, 1], 0, 2)
    return curve


def _draw_neck(canvas: Canvas, traits: Traits) -> None:
    half = 0.60 + 0.08 * traits.jaw_width
    points = [(-half, 0.8), (half, 0.8), (half, 1.7), (half + 0.15, 2.2), (-half - 0.15, 2.2), (-half, 1.7)]
    roi, alpha = canvas.fill(np.array(points, np.float32), 0.02)
    canvas.paint(roi, alpha, traits.skin * np.float32(0.80))
    roi, alpha = canvas.fill(smooth_curve([(-0.7, 1.2), (0.7, 1.2), (0.45, 1.85), (-0.45, 1.85)], closed=True), 0.09)
    canvas.darken(roi, 0.35 * alpha)


def _draw_ears(canvas: Canvas, traits: Traits) -> None:
    edge, length = 0.97 * traits.face_width, traits.ear_length
    for side in (-1, 1):
        points = [(edge - 0.08, -0.05), (edge + 0.10, -0.10), (edge + 0.13, 0.1), (edge + 0.08, 0.08 + length)]
        shape = smooth_curve([*points, (edge - 0.06, 0.12 + length)], closed=True)
        shape[:, 0] *= side
        roi, alpha = canvas.fill(shape, 0.01)
        canvas.paint(roi, alpha, traits.skin * np.array([0.93, 0.86, 0.84], np.float32))
        inner = shape * np.float32(0.55) + np.float32(0.45) * shape.mean(axis=0)
        roi, alpha = canvas.fill(inner, 0.02)
        canvas.darken(roi, 0.28 * alpha)


def _draw_skin(
    canvas: Canvas, traits: Traits, expression: Expression, outline: RenderedArray, rng: np.random.Generator
) -> None:
    roi, face = canvas.fill(outline, 0.008)
    canvas.paint(roi, face, traits.skin)
    _shade_face(canvas, traits, expression, outline)
    _shade_wrinkles(canvas, traits, rng)
    rough = traits.skin_roughness
    canvas.shade += np.float32(0.010 + 0.022 * rough) * canvas.noise(0.03)
    canvas.shade += np.float32(0.008 + 0.050 * rough) * canvas.noise(0.07)
    shade = canvas.shade[roi] * face
    for plane, depth in zip(canvas.rgb[:, *roi], (0.88, 1.05, 1.12), strict=True):  # shadows on skin are reddish
        plane *= 1 + np.float32(depth) * shade
    _draw_age_spots(canvas, traits, rng)
    for side in (-1, 1):
        spot = ellipse(0.58 * side, 0.48, 0.26, 0.20)
        blush_roi, blush = canvas.fill(spot, 0.12)
        rosy = traits.skin * np.array([1.02, 0.78, 0.76], np.float32)
        canvas.paint(blush_roi, traits.blush * blush, rosy)


def _shade_face(canvas: Canvas, traits: Traits, expression: Expression, outline: RenderedArray) -> None:
    inner = outline * np.array([0.86, 0.92], np.float32) + np.array([0, 0.02], np.float32)
    roi, light = canvas.fill(inner, 0.13)
    canvas.shade -= 0.30
    canvas.shade[roi] += 0.34 * light
    turn, nose_y, mouth_y = 0.09 * expression.turn, traits.nose_y, traits.mouth_y
    depth = traits.socket_depth
    canvas.blob(0.0, -0.55, 0.40, 0.18, 0.07)
    canvas.blobs(0.47, -0.13, 0.24, 0.10, -0.10 - 0.13 * depth)
    canvas.blobs(0.5, 0.02, 0.24, 0.15, -0.06 - 0.10 * depth)
    canvas.blobs(0.24, -0.06, 0.08, 0.14, -0.10 - 0.12 * depth)
    canvas.blobs(0.55, 0.38, 0.18, 0.12, 0.09 + 0.04 * traits.cheek_fullness)
    hollow = 1 - traits.cheek_fullness
    canvas.blobs(0.72, 0.80, 0.14, 0.28, -0.11 * hollow)
    canvas.blob(0.5 * turn, 0.20, 0.055, 0.28, 0.14)
    wide = traits.nose_width
    canvas.blob(-0.15 * wide + 0.5 * turn, 0.28, 0.06, 0.22, -0.11)
    canvas.blob(0.15 * wide + 0.5 * turn, 0.28, 0.06, 0.22, -0.11)
    canvas.blob(turn, nose_y - 0.04, 0.07 * wide, 0.06, 0.16)
    canvas.blob(turn - 0.24 * wide, nose_y + 0.02, 0.05, 0.09, -0.20)
    canvas.blob(turn + 0.24 * wide, nose_y + 0.02, 0.05, 0.09, -0.20)
    canvas.blob(turn, nose_y + 0.17, 0.20 * wide, 0.05, -0.22)
    middle = 0.05 * expression.turn
    canvas.blob(middle, 0.5 * (nose_y + mouth_y) + 0.03, 0.03, 0.06, -0.08)
    canvas.blobs(0.47, mouth_y, 0.08, 0.09, -0.10)
    lips = 0.14 * traits.lip_thickness
    canvas.blob(middle, mouth_y + lips + 0.08, 0.20, 0.05, -0.20)
    canvas.blob(middle, traits.chin_y - 0.18, 0.18, 0.11, 0.10)
    for amount, y in ((-0.30 * traits.eye_bags, 0.25), (0.10 * traits.eye_bags, 0.17)):
        canvas.blobs(0.48, y, 0.15, 0.035, amount)
    canvas.blobs(0.62, 1.22, 0.09, 0.12, -0.26 * traits.jowls)
    canvas.blobs(0.60, 1.05, 0.12, 0.10, 0.10 * traits.jowls)
    canvas.shade_blobs()


def _shade_wrinkles(canvas: Canvas, traits: Traits, rng: np.random.Generator) -> None:
    lines: list[tuple[RenderedArray, float]] = []

    def add(points: list[tuple[float, float]], age_years: float, first: float, last: float) -> None:
        strength = min(max((age_years - first) / (last - first), 0.0), 1.0)
        if strength > 0:
            jitter = 0.008 * rng.standard_normal((len(points), 2))
            knots = (np.array(points) + jitter).tolist()
            lines.append((smooth_curve([(x, y) for x, y in knots]), strength))

    age = traits.wrinkle_age_years
    for i, first in enumerate((22.0, 34.0, 46.0, 58.0)):
        y = (-0.50, -0.58, -0.43, -0.655)[i]
        half = float(rng.uniform(0.42, 0.58))
        add(
            [(-half, y + 0.03), (-half / 2, y - 0.02), (0, y + 0.01), (half / 2, y - 0.02), (half, y + 0.03)],
            age,
            first,
            first + 50,
        )
    for side in (-1, 1):
        add([(0.07 * side, -0.34), (0.09 * side, -0.25), (0.08 * side, -0.16)], age, 30, 85)
    crow = traits.crow_age_years
    for side in (-1, 1):
        for i, first in enumerate((26.0, 36.0, 50.0, 64.0)):
            rise = (-0.02, -0.09, 0.07, 0.14)[i]
            add([(0.76 * side, rise * 0.5), (0.84 * side, rise), (0.92 * side, rise * 1.9)], crow, first, first + 45)
        for i, first in enumerate((30.0, 48.0)):
            drop = 0.05 * i
            add(
                [(0.28 * side, 0.17 + drop), (0.46 * side, 0.245 + drop), (0.66 * side, 0.20 + drop)],
                crow,
                first,
                first + 50,
            )
    fold = traits.fold_age_years
    wing, mouth_y = 0.27 * traits.nose_width, traits.mouth_y
    for side in (-1, 1):
        add(
            [(wing * side, traits.nose_y), (0.42 * side, 0.76), (0.53 * side, mouth_y), (0.52 * side, mouth_y + 0.10)],
            fold,
            12,
            75,
        )
        add([(0.46 * side, mouth_y + 0.05), (0.47 * side, mouth_y + 0.18), (0.44 * side, mouth_y + 0.32)], fold, 38, 95)
        add([(0.62 * side, 0.62), (0.70 * side, 0.82), (0.70 * side, 1.02)], fold, 55, 105)
        for i in range(3):
            x = (0.08 + 0.12 * i) * side
            add([(x, mouth_y - 0.20), (x * 1.05, mouth_y - 0.12)], fold, 55 + 5 * i, 105)
    if not lines:
        return
    roi, crease = canvas.stroke(lines, 0.027, 0.012)
    shade = canvas.shade[roi]
    shade -= 0.58 * crease
    lower = np.zeros_like(crease)
    offset = max(round(0.03 * canvas.scale_px), 1)
    lower[offset:] = crease[:-offset]
    shade += 0.16 * lower


def _draw_age_spots(canvas: Canvas, traits: Traits, rng: np.random.Generator) -> None:
    centres = rng.uniform((-0.85, -0.62), (0.85, 1.1), (26, 2))
    sizes = rng.uniform(0.02, 0.055, 26)
    onsets = rng.uniform(0.0, 0.9, 26)
    lines: list[tuple[RenderedArray, float]] = []
    for (x, y), size, onset in zip(centres, sizes, onsets, strict=True):
        strength = min(max((traits.age_spots - onset) * 2.5, 0.0), 1.0)
        if strength > 0:
            lines.append((ellipse(float(x), float(y), float(size) * 0.5, float(size) * 0.4), strength))
    if lines:
        roi, alpha = canvas.stroke(lines, 0.035, 0.012)
        canvas.paint(roi, 0.42 * alpha, traits.skin * np.array([0.60, 0.48, 0.40], np.float32))


def _draw_eye(canvas: Canvas, traits: Traits, expression: Expression, side: int) -> None:
    half = 0.225 * traits.eye_size
    up = 0.112 * traits.eye_size * traits.eye_aperture
    down = 0.075 * traits.eye_size * traits.eye_aperture
    along = np.linspace(-1, 1, 17, dtype=np.float32)  # -1 is the inner corner
    lift = -traits.eye_tilt * half * along
    upper = np.stack([half * along, -up * (1 - np.abs(along) ** 2.2) + lift], axis=1)
    lower = np.stack([half * along, down * (1 - along**2) + lift], axis=1)
    place = np.array([0.5 * side, 0.0], np.float32)
    mirror = np.array([side, 1], np.float32)
    upper, lower = upper * mirror + place, lower * mirror + place
    roi, opening = canvas.fill(np.concatenate([upper, lower[::-1]]), 0.006)
    canvas.paint(roi, opening, np.array([0.93, 0.92, 0.90], np.float32))

    def disc(x: float, y: float, radius: float, colour: RenderedArray, strength: float = 1.0) -> None:
        disc_roi, alpha = canvas.fill(ellipse(x, y, radius, radius), 0.005)
        full = np.zeros_like(canvas.alpha[roi])
        top, left = max(disc_roi[0].start, roi[0].start), max(disc_roi[1].start, roi[1].start)
        bottom, right = min(disc_roi[0].stop, roi[0].stop), min(disc_roi[1].stop, roi[1].stop)
        if top >= bottom or left >= right:
            return
        full[top - roi[0].start : bottom - roi[0].start, left - roi[1].start : right - roi[1].start] = alpha[
            top - disc_roi[0].start : bottom - disc_roi[0].start, left - disc_roi[1].start : right - disc_roi[1].start
        ]
        canvas.paint(roi, strength * full * opening, colour)

    x = 0.5 * side + 0.02 * expression.gaze_x
    y = -0.012 + 0.01 * expression.gaze_y
    radius = 0.108 * traits.eye_size**0.7
    disc(x, y, radius, traits.iris * np.float32(0.5))
    disc(x, y, radius * 0.86, traits.iris)
    disc(x, y + radius * 0.35, radius * 0.45, np.minimum(traits.iris * 1.3, 1), 0.6)
    disc(x, y, radius * 0.45, np.full(3, 0.03, np.float32))
    lid_roi, shadow = canvas.stroke([(upper + np.array([0, 0.02], np.float32), 1.0)], 0.04, 0.015)
    canvas.darken(lid_roi, 0.4 * shadow)
    disc(x - 0.03, y - 0.035, radius * 0.22, np.ones(3, np.float32), 0.95)

    dark = np.minimum(traits.brow_colour * 0.35, traits.skin * 0.3)
    lid_roi, line = canvas.stroke([(upper, 1.0)], 0.022 + 0.028 * traits.lashes, 0.006)
    canvas.paint(lid_roi, min(0.65 + 0.3 * traits.lashes, 1.0) * line, dark)
    lashes = []
    for step in (10, 12, 14, 16):
        out = np.array([side * (0.03 + 0.02 * (step - 10) / 6), -0.05], np.float32) * np.float32(traits.lashes)
        lashes.append((np.stack([upper[step], upper[step] + out]), 1.0))
    if traits.lashes > 0.1:
        lid_roi, line = canvas.stroke(lashes, 0.018, 0.004)
        canvas.paint(lid_roi, min(traits.lashes, 1.0) * line, dark)
    lid_roi, line = canvas.stroke([(lower, 1.0)], 0.015, 0.008)
    canvas.paint(lid_roi, 0.5 * line, traits.skin * np.float32(0.45))
    droop = 0.03 * traits.eye_bags
    fold = upper * np.float32(1.0) + np.array([0.0, -0.055 + droop], np.float32)
    lid_roi, line = canvas.stroke([(fold[2:-1], 1.0)], 0.018, 0.008)
    canvas.paint(lid_roi, min(0.75 * traits.eye_fold, 1.0) * line, traits.skin * np.float32(0.45))


def _draw_brow(canvas: Canvas, traits: Traits, side: int) -> None:
    along = np.linspace(0, 1, 9)
    x = 0.20 + 0.58 * along
    arch = 0.05 + 0.09 * traits.brow_arch
    middle = traits.brow_height + 0.04 - arch * np.sin(np.pi * np.clip(along * 0.8 + 0.1, 0, 1)) + 0.05 * along
    thick = 0.048 * traits.brow_thickness * (1.05 - 0.75 * along**1.5)
    points = np.concatenate([np.stack([x, middle - thick], 1), np.stack([x, middle + thick], 1)[::-1]])
    points[:, 0] *= side
    roi, alpha = canvas.fill(points.astype(np.float32), 0.014)
    ragged = np.clip(alpha * (0.95 + 0.22 * canvas.noise(0.03)[roi]), 0, 1)
    canvas.paint(roi, (0.88 * ragged).astype(np.float32), traits.brow_colour)


def _draw_nostrils(canvas: Canvas, traits: Traits, expression: Expression) -> None:
    turn, y, wide = 0.09 * expression.turn, traits.nose_y, traits.nose_width
    for side in (-1, 1):
        x = turn + 0.115 * wide * side
        roi, alpha = canvas.fill(ellipse(x, y + 0.095, 0.055 * wide, 0.028), 0.014)
        canvas.paint(roi, 0.75 * alpha, traits.skin * np.float32(0.22))
        wing = smooth_curve(
            [
                (turn + 0.20 * wide * side, y - 0.09),
                (turn + 0.265 * wide * side, y + 0.02),
                (turn + 0.20 * wide * side, y + 0.10),
            ]
        )
        roi, alpha = canvas.stroke([(wing, 1.0)], 0.024, 0.014)
        canvas.darken(roi, 0.42 * alpha)
    base = smooth_curve([(turn - 0.10 * wide, y + 0.11), (turn, y + 0.14), (turn + 0.10 * wide, y + 0.11)])
    roi, alpha = canvas.stroke([(base, 1.0)], 0.022, 0.014)
    canvas.darken(roi, 0.35 * alpha)


def _draw_mouth(canvas: Canvas, traits: Traits, expression: Expression) -> None:
    half = _half_mouth(traits, expression)
    middle, y = 0.05 * expression.turn, traits.mouth_y
    lift, gap = 0.05 * expression.smile, 0.085 * expression.mouth_open
    thick = traits.lip_thickness
    along = np.linspace(-1, 1, 21)
    corner = 1 - along**2
    line = y - lift * (1.3 * along**2 - 0.3)
    bow = 0.085 * thick * (corner**0.8) * (1 - 0.28 * np.exp(-((along / 0.16) ** 2)))
    top = line - gap * 0.4 * corner - bow
    inner_top = line - gap * 0.4 * corner
    inner_bottom = line + gap * 0.8 * corner
    bottom = inner_bottom + 0.105 * thick * corner**0.7
    x = middle + half * along

    def band(first: npt.NDArray[np.float64], last: npt.NDArray[np.float64]) -> RenderedArray:
        return np.concatenate([np.stack([x, first], 1), np.stack([x, last], 1)[::-1]]).astype(np.float32)

    red = np.array([0.72, 0.22, 0.25], np.float32)
    plain = traits.skin * np.array([0.82, 0.60, 0.60], np.float32)
    colour = plain + np.float32(0.55 * np.clip(traits.lip_redness, 0, 1.2)) * (
        red * (0.45 + 0.6 * traits.skin[0]) - plain
    )
    roi, alpha = canvas.fill(band(top, inner_bottom), 0.012)
    canvas.paint(roi, alpha, colour * np.float32(0.82))
    roi, alpha = canvas.fill(band(inner_bottom, bottom), 0.012)
    canvas.paint(roi, alpha, colour)
    roi, alpha = canvas.fill(ellipse(middle, y + gap * 0.8 + 0.055 * thick, 0.15, 0.018 * thick), 0.02)
    canvas.paint(roi, 0.35 * alpha, np.minimum(colour * 1.35 + 0.08, 1).astype(np.float32))
    if gap > 0.005:
        roi, alpha = canvas.fill(band(inner_top, inner_bottom), 0.006)
        canvas.paint(roi, alpha, np.array([0.22, 0.06, 0.06], np.float32))
        roi, alpha = canvas.fill(band(inner_top + 0.004, inner_top + 0.75 * gap * corner), 0.008)
        canvas.paint(roi, 0.95 * alpha, np.array([0.93, 0.91, 0.86], np.float32))
    seam = np.stack([x, 0.5 * (inner_top + inner_bottom) if gap <= 0.005 else inner_top], 1).astype(np.float32)
    roi, alpha = canvas.stroke([(seam, 1.0)], 0.026, 0.010)
    canvas.paint(roi, 0.8 * alpha, colour * np.float32(0.35))


def _draw_beard(canvas: Canvas, traits: Traits, expression: Expression, outline: RenderedArray) -> None:
    if traits.beard < 0.01:
        return
    mouth_y = traits.mouth_y
    roi, face = canvas.fill(outline, 0.02)
    lower = smooth_curve(
        [
            (-1.1, 0.45),
            (-0.75, 0.75),
            (-0.45, mouth_y - 0.15),
            (-0.1, mouth_y - 0.24),
            (0.1, mouth_y - 0.24),
            (0.45, mouth_y - 0.15),
            (0.75, 0.75),
            (1.1, 0.45),
            (1.1, 2.1),
            (-1.1, 2.1),
        ],
        closed=True,
    )
    area = np.zeros_like(canvas.alpha)
    area_roi, alpha = canvas.fill(lower, 0.04)
    area[area_roi] = alpha
    half, middle = _half_mouth(traits, expression), 0.05 * expression.turn
    open_gap = 0.07 * expression.mouth_open
    lips = ellipse(middle, mouth_y + open_gap * 0.3, half * 1.02, 0.095 * traits.lip_thickness + open_gap)
    lips_roi, alpha = canvas.fill(lips, 0.02)
    area[lips_roi] *= 1 - alpha
    texture = np.clip(0.75 + 0.25 * canvas.noise(0.03)[roi] + 0.15 * canvas.noise(0.07)[roi], 0, 1)
    canvas.paint(roi, 0.9 * traits.beard**0.7 * face * area[roi] * texture, traits.hair * np.float32(0.8))
