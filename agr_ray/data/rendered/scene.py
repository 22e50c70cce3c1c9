"""Rendered chips and photographs: heads in front of a background, with light, blur and noise.

Labels, looks, pose, background, light, camera and so on have a random stream each, keyed by (seed, kind, index,
stream). So labels affect nothing outside the head, and items can be rendered alone and in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from agr_ray.data.rendered.canvas import HEAD_CENTRE_Y, HEAD_HALF_HEIGHT, HEAD_HALF_WIDTH, head_outline
from agr_ray.data.rendered.head import Head, draw_expression, draw_head
from agr_ray.data.rendered.traits import Labels, RenderedArray, draw_labels, draw_traits
from agr_ray.schema import BOX, LABEL_FIELDS, LANDMARKS

ImageRgb = npt.NDArray[np.uint8]

MIN_FACE_WIDTH_PX: Final = 48
"""Faces of photographs are at least this wide."""

_MIN_EYES_PX: Final = 27.0
"""Distance between the eyes at which the narrowest face is `MIN_FACE_WIDTH_PX` wide."""

_MAX_EYES_PX: Final = 160.0
_CHIP_EYES: Final = 0.40
_CHIP_EYE_Y: Final = 0.29
"""Geometry of UTKFace's chips, as fractions of the side."""

_MAX_ROLL_RADIANS: Final = 0.12


class _Kind(IntEnum):
    CHIP = 0
    PHOTOGRAPH = 1


class _Stream(IntEnum):
    LABELS = 0
    LOOKS = 1
    TEXTURE = 2
    EXPRESSION = 3
    POSE = 4
    BACKGROUND = 5
    CLOTHES = 6
    LIGHT = 7
    CAMERA = 8


@dataclass(frozen=True)
class Pose:
    """Position of a head: the point midway between the eyes and their distance in pixels, and the roll in radians."""

    x_px: float
    y_px: float
    eyes_px: float
    roll_radians: float

    def place(self, points: RenderedArray) -> RenderedArray:
        """Move points (n, 2) from the head's coordinates to pixels of the image."""
        cosine, sine = np.cos(self.roll_radians), np.sin(self.roll_radians)
        turn = self.eyes_px * np.array([[cosine, -sine], [sine, cosine]])
        placed: RenderedArray = (points @ turn.T + (self.x_px, self.y_px)).astype(np.float32)
        return placed


@dataclass(frozen=True)
class RenderedFace:
    """A face of a photograph: its labels and where it is, in pixels of the image.

    `landmarks` is (5, 2) in the order of `schema.LANDMARK_NAMES`.
    """

    age_years: float
    gender: str
    race: str
    box_xyxy: RenderedArray
    landmarks: RenderedArray
    pose: Pose


@dataclass(frozen=True)
class RenderedChip:
    """An image of one face, centred and tight like a chip of UTKFace.

    `image_rgb` is uint8 HWC. `box_xyxy` may reach a little beyond the image.
    `landmarks` is (5, 2) in the order of `schema.LANDMARK_NAMES`.
    """

    image_rgb: ImageRgb
    age_years: float
    gender: str
    race: str
    box_xyxy: RenderedArray
    landmarks: RenderedArray
    pose: Pose


@dataclass(frozen=True)
class RenderedPhotograph:
    """An image, uint8 HWC, of several people, and their faces from left to right."""

    image_rgb: ImageRgb
    faces: tuple[RenderedFace, ...]


def render_chip(seed: int, index: int, side_px: int = 200, labels: Labels | None = None) -> RenderedChip:
    """Render chip `index` of the set that `seed` names; the same arguments always give the same chip.

    `labels` replaces the labels that would be drawn. Everything else stays the same: another face in the same place,
    with the same light and camera.

    Raises:
        ValueError: a negative seed or index, or a side below 32 px.
    """
    if side_px < 32:
        raise ValueError(f"side_px={side_px}: a chip is at least 32 px wide")
    draw = _Streams(seed, _Kind.CHIP, index)
    rng = draw(_Stream.POSE)
    pose = Pose(
        x_px=side_px * (0.5 + 0.02 * _bounded(rng)),
        y_px=side_px * (_CHIP_EYE_Y + 0.02 * _bounded(rng)),
        eyes_px=side_px * _CHIP_EYES * float(np.exp(0.05 * _bounded(rng))),
        roll_radians=0.05 * _bounded(rng),
    )
    image, (face,) = _render(draw, side_px, side_px, [pose], labels)
    return RenderedChip(image, face.age_years, face.gender, face.race, face.box_xyxy, face.landmarks, pose)


def iter_chips(seed: int, num: int, side_px: int = 200) -> Iterator[RenderedChip]:
    """Render chips 0 to num - 1 of the set that `seed` names."""
    for index in range(num):
        yield render_chip(seed, index, side_px)


def render_photograph(
    seed: int, index: int, width_px: int, height_px: int, num_faces: int, labels: Labels | None = None
) -> RenderedPhotograph:
    """Render photograph `index` of the set that `seed` names. Heads do not overlap.

    `labels` replaces the labels that would be drawn for every face. Everything else stays the same.

    Raises:
        ValueError: a negative seed or index, or an image too small for so many faces of `MIN_FACE_WIDTH_PX`.
    """
    draw = _Streams(seed, _Kind.PHOTOGRAPH, index)
    poses = _place_heads(draw(_Stream.POSE), width_px, height_px, num_faces)
    image, faces = _render(draw, width_px, height_px, poses, labels)
    return RenderedPhotograph(image, tuple(sorted(faces, key=lambda face: float(face.box_xyxy[0]))))


def head_mask(poses: Iterable[Pose], width_px: int, height_px: int) -> npt.NDArray[np.bool_]:
    """Return the pixels that heads of these poses can cover, whatever their labels: HxW, bool."""
    mask = np.zeros((height_px, width_px), np.uint8)
    for pose in poses:
        cv2.fillPoly(mask, [np.round(pose.place(head_outline())).astype(np.int32)], 1)
    return cv2.dilate(mask, np.ones((9, 9), np.uint8)).astype(bool)


def chip_labels_table(keys: Iterable[str], chips: Iterable[RenderedChip]) -> pa.Table:
    """Return a table of key, age, gender and race: one row per chip."""
    rows = [
        {"key": key, "age": chip.age_years, "gender": chip.gender, "race": chip.race}
        for key, chip in zip(keys, chips, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema([_KEY, *LABEL_FIELDS]))


def photograph_labels_table(keys: Iterable[str], photographs: Iterable[RenderedPhotograph]) -> pa.Table:
    """Return a table of key, box, landmarks, age, gender and race: one row per face."""
    rows = [
        {
            "key": key,
            "box": face.box_xyxy.tolist(),
            "landmarks": face.landmarks.ravel().tolist(),
            "age": face.age_years,
            "gender": face.gender,
            "race": face.race,
        }
        for key, photograph in zip(keys, photographs, strict=True)
        for face in photograph.faces
    ]
    fields = [_KEY, pa.field("box", BOX), pa.field("landmarks", LANDMARKS), *LABEL_FIELDS]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


_KEY: Final = pa.field("key", pa.string(), nullable=False)


class _Streams:
    """Random streams of one item, each independent of the others and of every other item."""

    def __init__(self, seed: int, kind: _Kind, index: int) -> None:
        if seed < 0 or index < 0:
            raise ValueError(f"seed={seed}, index={index}: neither can be negative")
        self._key = (seed, int(kind), index)

    def __call__(self, stream: _Stream, face: int = 0) -> np.random.Generator:
        return np.random.default_rng([*self._key, int(stream), face])


def _bounded(rng: np.random.Generator) -> float:
    """Draw a standard normal number, limited to 2 standard deviations."""
    return float(np.clip(rng.standard_normal(), -2, 2))


def _render(
    draw: _Streams, width_px: int, height_px: int, poses: list[Pose], forced: Labels | None
) -> tuple[ImageRgb, list[RenderedFace]]:
    image = _background(draw(_Stream.BACKGROUND), width_px, height_px)
    for number in sorted(range(len(poses)), key=lambda number: poses[number].y_px):  # lower heads are in front
        _draw_shoulders(image, poses[number], draw(_Stream.CLOTHES, number))
    faces = []
    for number, pose in enumerate(poses):
        labels = forced or draw_labels(draw(_Stream.LABELS, number))
        traits = draw_traits(labels, draw(_Stream.LOOKS, number))
        expression = draw_expression(draw(_Stream.EXPRESSION, number))
        scale_px = float(np.clip(1.1 * pose.eyes_px, 30.0, 140.0))
        head = draw_head(traits, expression, draw(_Stream.TEXTURE, number), scale_px)
        _light_head(head, draw(_Stream.LIGHT, number + 1))
        _paste(image, head, pose)
        faces.append(_face(labels, head, pose))
    return _photograph(image, draw(_Stream.LIGHT), draw(_Stream.CAMERA)), faces


def _face(labels: Labels, head: Head, pose: Pose) -> RenderedFace:
    x0, y0, x1, y1 = head.box_xyxy
    corners = pose.place(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float32))
    middle = corners.mean(axis=0)
    half = 0.5 * pose.eyes_px * np.array([x1 - x0, y1 - y0])
    box = np.concatenate([middle - half, middle + half]).astype(np.float32)
    return RenderedFace(labels.age_years, labels.gender, labels.race, box, pose.place(head.landmarks), pose)


def _paste(image: RenderedArray, head: Head, pose: Pose) -> None:
    """Blend a head into the image at its pose."""
    outline = pose.place(head_outline(32))
    height, width = image.shape[:2]
    x0, y0 = np.clip(np.floor(outline.min(axis=0)).astype(int) - 2, 0, (width, height))
    x1, y1 = np.clip(np.ceil(outline.max(axis=0)).astype(int) + 3, 0, (width, height))
    if x0 >= x1 or y0 >= y1:
        return
    corners = np.array([[0, 0], [1, 0], [0, 1]], np.float32)
    canvas_px = corners * np.float32(head.scale_px) + np.array(head.origin_px, np.float32) - np.float32(0.5)
    placed_px = pose.place(corners) - np.array([x0 + 0.5, y0 + 0.5], np.float32)
    matrix = cv2.getAffineTransform(canvas_px, placed_px)
    layers = cv2.merge([*head.rgb, head.alpha])
    shrink = head.scale_px / pose.eyes_px
    if shrink > 1.6:
        layers = cv2.GaussianBlur(layers, (0, 0), 0.4 * shrink)
    warped = cv2.warpAffine(layers, matrix, (int(x1 - x0), int(y1 - y0)), flags=cv2.INTER_LINEAR)
    region = image[y0:y1, x0:x1]
    clear = 1 - warped[..., 3]
    for channel in range(3):
        plane = region[..., channel]
        plane *= clear
        plane += warped[..., channel]


def _light_head(head: Head, rng: np.random.Generator) -> None:
    """Light a head from one side: `head.rgb` is changed in place."""
    side, above = 0.13 * _bounded(rng), 0.06 * _bounded(rng)
    height, width = head.alpha.shape
    across = 1 + side * np.sin(np.linspace(-1.5, 1.5, width, dtype=np.float32))
    down = 1 - above * np.linspace(-1, 1, height, dtype=np.float32)
    head.rgb[...] *= down[:, None] * across[None, :]


def _background(rng: np.random.Generator, width: int, height: int) -> RenderedArray:
    """Draw soft colours and a few shapes: float32 HxWx3 in 0..1."""
    cells = int(rng.integers(2, 9))
    base = _muted(rng, 0.25)
    rows = max(2, round(cells * height / width))
    colours = base + rng.normal(0, rng.uniform(0.02, 0.15), (rows, cells, 1)) + rng.normal(0, 0.03, (rows, cells, 3))
    colours = np.clip(colours, 0, 1).astype(np.float32)
    image = np.asarray(cv2.resize(colours, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)
    size = np.array([width, height])
    for _ in range(int(rng.integers(0, 9))):
        colour = tuple(float(value) for value in _muted(rng, 0.3))
        centre = rng.uniform(-0.1, 1.1, 2) * size
        half = rng.uniform(0.03, 0.35, 2) * size
        if rng.random() < 0.7:
            low, high = (centre - half).astype(int).tolist(), (centre + half).astype(int).tolist()
            cv2.rectangle(image, low, high, colour, -1)
        else:
            cv2.circle(image, centre.astype(int).tolist(), int(half.min()), colour, -1)
    blurred = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.004, 0.03) * min(width, height)))
    return np.clip(np.asarray(blurred, np.float32), 0, 1)


def _muted(rng: np.random.Generator, spread: float) -> RenderedArray:
    """Draw a near-grey colour of any brightness: RGB in 0..1."""
    return np.clip(rng.uniform(0.1, 0.9) + spread * rng.uniform(-0.5, 0.5, 3), 0, 1).astype(np.float32)


def _draw_shoulders(image: RenderedArray, pose: Pose, rng: np.random.Generator) -> None:
    """Draw shoulders, in clothes of any colour, below the neck. Their shape does not depend on the labels."""
    points = np.array(
        [[-0.55, 1.75], [-1.3, 1.95], [-2.15, 2.3], [-2.5, 60.0], [2.5, 60.0], [2.15, 2.3], [1.3, 1.95], [0.55, 1.75]]
    )
    colour = tuple(float(value) for value in _muted(rng, 0.5))
    pixels = np.round(pose.place(points.astype(np.float32)) * 16).astype(np.int32)
    cv2.fillPoly(image, [pixels], colour, cv2.LINE_8, 4)
    seam = pose.place(np.array([[-2.0, 2.5], [-1.75, 3.2], [-1.7, 60.0]], np.float32))
    other = pose.place(np.array([[2.0, 2.5], [1.75, 3.2], [1.7, 60.0]], np.float32))
    dark = tuple(0.7 * value for value in colour)
    lines = [np.round(line * 16).astype(np.int32) for line in (seam, other)]
    cv2.polylines(image, lines, False, dark, max(round(0.04 * pose.eyes_px), 1), cv2.LINE_8, 4)


def _photograph(image: RenderedArray, light: np.random.Generator, camera: np.random.Generator) -> ImageRgb:
    """Light the whole scene, then add blur and noise: uint8 HWC."""
    height, width = image.shape[:2]
    gain = float(np.exp(0.12 * _bounded(light)))
    cast = (1 + 0.03 * light.standard_normal(3)).astype(np.float32)
    slope_x, slope_y = 0.07 * _bounded(light), 0.07 * _bounded(light)
    across = gain + gain * slope_x * np.linspace(-1, 1, width, dtype=np.float32)
    down = 1 + slope_y * np.linspace(-1, 1, height, dtype=np.float32)
    light_map = down[:, None] * across[None, :]
    lit = cv2.multiply(image, cv2.merge([light_map * value for value in 255 * cast]))
    sigma = float(camera.uniform(0.0, 0.8)) * min(1.0, min(width, height) / 200)
    if sigma > 0.3:
        lit = cv2.GaussianBlur(lit, (0, 0), sigma)
    grain = np.frombuffer(camera.bytes(height * width * 3), np.uint8).reshape(height, width, 3)
    strength = float(camera.uniform(0.0, 0.07))
    noisy = lit + np.float32(strength) * (grain.astype(np.float32) - 127.5)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def _place_heads(rng: np.random.Generator, width_px: int, height_px: int, num_faces: int) -> list[Pose]:
    """Cut the image into one cell per head by random cuts, and place each head at random within its cell."""
    if num_faces == 0:
        return []
    need_w, need_h = _MIN_EYES_PX * _head_extent(_MAX_ROLL_RADIANS)
    cells = None
    for _ in range(60):
        cells = _cut(rng, (0.0, 0.0, float(width_px), float(height_px)), num_faces, need_w, need_h)
        if cells is not None:
            break
    if cells is None:
        columns = next((n for n in range(1, num_faces + 1) if height_px >= -(-num_faces // n) * need_h), num_faces)
        rows = -(-num_faces // columns)
        cell_w, cell_h = width_px / columns, height_px / rows
        if cell_w < need_w or cell_h < need_h:
            raise ValueError(
                f"{num_faces} faces need more room than {width_px} x {height_px} px: "
                f"a head of the smallest size takes {need_w:.0f} x {need_h:.0f} px"
            )
        grid = [
            (c * cell_w, r * cell_h, (c + 1) * cell_w, (r + 1) * cell_h) for r in range(rows) for c in range(columns)
        ]
        cells = grid[:num_faces]
    return [_place_head(rng, cell) for cell in cells]


_Cell = tuple[float, float, float, float]


def _cut(rng: np.random.Generator, cell: _Cell, num: int, need_w: float, need_h: float) -> list[_Cell] | None:
    """Cut a cell into `num` cells by random cuts; None if one is too small."""
    x0, y0, x1, y1 = cell
    if x1 - x0 < need_w or y1 - y0 < need_h:
        return None
    if num == 1:
        return [cell]
    first = int(rng.integers(1, num))
    share = float(np.clip(first / num + rng.uniform(-0.2, 0.2), 0.15, 0.85))
    if rng.random() < (x1 - x0) / (x1 - x0 + y1 - y0):
        cut = x0 + share * (x1 - x0)
        one, two = (x0, y0, cut, y1), (cut, y0, x1, y1)
    else:
        cut = y0 + share * (y1 - y0)
        one, two = (x0, y0, x1, cut), (x0, cut, x1, y1)
    left = _cut(rng, one, first, need_w, need_h)
    right = _cut(rng, two, num - first, need_w, need_h) if left is not None else None
    return left + right if left is not None and right is not None else None


def _head_extent(roll_radians: float) -> npt.NDArray[np.float64]:
    """Return a width and height that always contain a head at this roll, in distances between the eyes."""
    cosine, sine = np.cos(roll_radians), abs(np.sin(roll_radians))
    return 2 * np.array(
        [HEAD_HALF_WIDTH * cosine + HEAD_HALF_HEIGHT * sine, HEAD_HALF_HEIGHT * cosine + HEAD_HALF_WIDTH * sine]
    )


def _place_head(rng: np.random.Generator, cell: _Cell) -> Pose:
    x0, y0, x1, y1 = cell
    roll = float(np.clip(0.05 * rng.standard_normal(), -_MAX_ROLL_RADIANS, _MAX_ROLL_RADIANS))
    width, height = _head_extent(roll)
    largest = min((x1 - x0) / width, (y1 - y0) / height, _MAX_EYES_PX)
    eyes = _MIN_EYES_PX * (max(largest, _MIN_EYES_PX) / _MIN_EYES_PX) ** float(rng.uniform(0, 1))
    middle_x = float(rng.uniform(x0 + eyes * width / 2, x1 - eyes * width / 2))
    middle_y = float(rng.uniform(y0 + eyes * height / 2, y1 - eyes * height / 2))
    down = eyes * HEAD_CENTRE_Y
    return Pose(middle_x + down * np.sin(roll), middle_y - down * np.cos(roll), eyes, roll)
