"""MTCNN: a cascade of three small nets that gives boxes and five landmarks.

Source: Zhang, Zhang, Li and Qiao, "Joint face detection and alignment using multitask cascaded convolutional
networks", 2016. The weights are facenet-pytorch's. The cascade is our own, because theirs clips crops at the image's
border and then stretches them to a square, which moves the landmarks of tight chips. Here everything outside the image
is black: P-Net sees half a window of it on every side, and crops keep their aspect ratio.

Each net runs on whole batches. For P-Net, all pyramid levels of all images are laid out on one sheet, which is
processed in strips of equal size: oneDNN would compile the convolutions again for every new size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agr_ray.vision.detectors.mtcnn_nets import Nets
from agr_ray.vision.faces import Faces

_PYRAMID_FACTOR: Final = 0.709
_NUM_COARSE_LEVELS: Final = 5  # later levels, for large faces, are spaced twice as densely: they cost almost nothing
_WINDOW_PX: Final = 12  # receptive field of one output cell of P-Net
_STRIDE_PX: Final = 2  # between neighbouring cells
_BORDER_PX: Final = 6  # black border at every scale, so that a face centred on the image's edge is found
_OVERLAP_PX: Final = _WINDOW_PX - _STRIDE_PX  # of neighbouring cells' windows, and of neighbouring strips
_NMS_WITHIN_SCALE: Final = 0.5
_NMS_BETWEEN_STAGES: Final = 0.7

_MAX_BATCH_PIXELS: Final = 16_000_000  # of images that go through the nets together: bounds memory
_SHEET_WIDTH_PX: Final = 768  # the pyramid levels of 1280 px photographs fill nine tenths of such a sheet
_STRIP_HEIGHT_PX: Final = 192  # keeps P-Net's feature maps in the CPU's cache
_CHUNK_PIXELS: Final = 36_864  # per pass of R-Net (64 crops) or O-Net (16): also for the cache
_CHUNK_STEP: Final = 8  # the number of crops is padded to a multiple of it, so that there are few tensor sizes
_FINAL_SHIFTS: Final = ((0.0, 0.0), (0.05, 0.05), (-0.05, 0.05), (0.05, -0.05), (-0.05, -0.05))  # of the face's side


class Mtcnn:
    """The cascade. A face's score is O-Net's probability.

    Args:
        name: the detector's.
        nets: computes the three nets.
        min_face_px: see `detect.make_detector`.
        thresholds: lowest probabilities at which the three nets pass a candidate on.
        min_score: see `detect.make_detector`.
    """

    def __init__(
        self,
        name: str,
        nets: Nets,
        *,
        min_face_px: float,
        thresholds: tuple[float, float, float],
        min_score: float,
    ) -> None:
        self.name = name
        self._nets = nets
        self._min_face_px = min_face_px
        self._thresholds = thresholds
        self._min_score = min_score

    def detect(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Faces]:
        """Return the faces of each image (uint8, height x width x 3, sizes may differ)."""
        return [faces for batch in _batches(images_rgb) for faces in self._detect_batch(batch)]

    @torch.inference_mode()
    def _detect_batch(self, images_rgb: list[NDArray[np.uint8]]) -> list[Faces]:
        images = [_halved(rgb) for rgb in images_rgb]
        boxes, owners = self._propose(images)
        boxes, owners = self._refine(images, boxes, owners)
        boxes, scores, landmarks, owners = self._output(images, boxes, owners)
        faces = []
        for index in range(len(images)):
            own = owners == index
            faces.append(Faces.sorted_by_score(boxes[own].numpy(), scores[own].numpy(), landmarks[own].numpy()))
        return faces

    def _propose(self, images: list[_Halvings]) -> tuple[Tensor, Tensor]:
        """Run P-Net over the pyramids; return square candidates (k, 4) and their owners (k,), indices of images."""
        sheet, tiles = _sheet(images, self._min_face_px)
        cells, scores, regressions = _candidates(self._nets, sheet, self._thresholds[0])
        tile_k = _tile_numbers(tiles, sheet.shape)[cells[:, 0], cells[:, 1]]
        # By tile, so that equal scores keep an order that does not depend on the layout of the sheet.
        order = tile_k.argsort(stable=True)
        order = order[tile_k[order] >= 0]
        cells, scores, regressions, tile_k = cells[order], scores[order], regressions[order], tile_k[order]

        table = torch.tensor([(t.left, t.top, t.to_image_x, t.to_image_y) for t in tiles]).reshape(-1, 4)[tile_k]
        corners = cells.flip(1) * _STRIDE_PX - table[:, :2]
        windows = torch.cat([corners, corners + _WINDOW_PX], dim=1)
        boxes = windows * table[:, 2:].repeat(1, 2)
        owners = torch.tensor([tile.owner for tile in tiles], dtype=torch.long)[tile_k]
        # The windows are on whole pixels, so that rounding does not decide overlaps that are exactly the limit.
        kept = _suppress(windows, scores, tile_k, _NMS_WITHIN_SCALE)
        kept = kept[_suppress(boxes[kept], scores[kept], owners[kept], _NMS_BETWEEN_STAGES)]
        return _square(_regress(boxes[kept], regressions[kept])), owners[kept]

    def _refine(self, images: list[_Halvings], boxes: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """Run R-Net over the candidates; return those that pass, as regressed squares, and their owners."""
        if len(boxes) == 0:
            return boxes, owners
        crops, boxes = _cut(images, boxes, owners, 24)
        regression, probability = _run(self._nets.refine, crops)
        passed = probability[:, 1] > self._thresholds[1]
        boxes, owners = boxes[passed], owners[passed]
        kept = _suppress(boxes, probability[passed, 1], owners, _NMS_BETWEEN_STAGES)
        return _square(_regress(boxes[kept], regression[passed][kept])), owners[kept]

    def _output(self, images: list[_Halvings], boxes: Tensor, owners: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run O-Net over the candidates; return boxes (k, 4), scores (k,), landmarks (k, 5, 2) and owners (k,).

        Landmarks move by 2 to 3 % of the face with the crop, and the scores of faces at the image's border vary more.
        The first crop is arbitrary, because it depends on P-Net's grid. So each remaining face is cropped twice more,
        each time by O-Net's latest box, and its highest score counts. Then it is cropped at five positions around the
        last box; averaging their boxes and landmarks halves the noise.
        """
        boxes, scores, _ = self._output_once(images, boxes, owners)
        passed = scores > self._thresholds[2]
        boxes, scores, owners = boxes[passed], scores[passed], owners[passed]
        kept = _suppress_contained(boxes, scores, owners, _NMS_BETWEEN_STAGES)
        boxes, scores, owners = boxes[kept], scores[kept], owners[kept]
        for finely in (False, True):
            boxes, new_scores, _ = self._output_once(images, _square(boxes), owners, finely=finely)
            scores = torch.maximum(scores, new_scores)
        passed = scores >= self._min_score
        squares, scores, owners = _square(boxes[passed]), scores[passed], owners[passed]
        shifts = torch.tensor(_FINAL_SHIFTS)[:, None, :] * (squares[:, 2:] - squares[:, :2])
        shifted = (squares + shifts.repeat(1, 1, 2)).round().reshape(-1, 4)
        boxes, _, landmarks = self._output_once(images, shifted, owners.repeat(len(_FINAL_SHIFTS)), finely=True)
        # In float64: the order of a sum depends on the number of faces.
        boxes = boxes.double().reshape(len(_FINAL_SHIFTS), -1, 4).mean(dim=0).float()
        landmarks = landmarks.double().reshape(len(_FINAL_SHIFTS), -1, 5, 2).mean(dim=0).float()
        kept = _suppress_contained(boxes, scores, owners, _NMS_BETWEEN_STAGES)  # two may have converged on one face
        return boxes[kept], scores[kept], landmarks[kept], owners[kept]

    def _output_once(
        self, images: list[_Halvings], squares: Tensor, owners: Tensor, *, finely: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        if len(squares) == 0:
            return squares, squares[:, 0], squares.new_zeros((0, 5, 2))
        crops, squares = _cut(images, squares, owners, 48, finely=finely)
        regression, points, probability = _run(self._nets.output, crops)
        fractions = points.reshape(-1, 2, 5).transpose(1, 2)  # the net gives five x, then five y
        landmarks = squares[:, None, :2] + fractions * (squares[:, 2:] - squares[:, :2])[:, None]
        return _regress(squares, regression), probability[:, 1], landmarks


_Halvings = list[NDArray[np.uint8]]
"""An image, uint8 RGB, at its full size, half of it, a quarter and so on."""


class _Tile(NamedTuple):
    """The place of one pyramid level of an image on the sheet."""

    owner: int
    """Index of the image."""
    top: int
    left: int
    height: int
    width: int
    to_image_x: float
    """Pixels of the image per pixel of the level."""
    to_image_y: float


def _candidates(nets: Nets, sheet: NDArray[np.uint8], threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cells (row, column) with a face, (k, 2), their probabilities (k,) and their box regressions (k, 4).

    A cell has a face if its probability is at least `threshold`.
    """
    num_columns = _num_cells(sheet.shape[1])
    per_strip = _STRIP_HEIGHT_PX // _STRIDE_PX * num_columns
    tops = range(0, len(sheet) - _OVERLAP_PX, _STRIP_HEIGHT_PX)
    strips = [nets.propose(sheet[top : top + _STRIP_HEIGHT_PX + _OVERLAP_PX], threshold) for top in tops]
    if not strips:  # all images are smaller than a window
        return torch.zeros(0, 2).long(), torch.zeros(0), torch.zeros(0, 4)
    numbers, probabilities, regressions = (torch.cat(each) for each in zip(*strips, strict=True))
    numbers += per_strip * torch.arange(len(strips)).repeat_interleave(torch.tensor([len(each[0]) for each in strips]))
    return torch.stack([numbers // num_columns, numbers % num_columns], dim=1), probabilities, regressions


def _run(net: Callable[[NDArray[np.uint8]], tuple[Tensor, ...]], crops_nhwc: NDArray[np.uint8]) -> tuple[Tensor, ...]:
    """Run a net over any number of crops, at least one."""
    num_crops = len(crops_nhwc)
    padding = np.zeros((-num_crops % _CHUNK_STEP, *crops_nhwc.shape[1:]), np.uint8)
    crops = np.concatenate([crops_nhwc, padding])
    size = _CHUNK_PIXELS // crops[0, ..., 0].size
    outputs = [net(crops[first : first + size]) for first in range(0, len(crops), size)]
    return tuple(torch.cat(parts)[:num_crops] for parts in zip(*outputs, strict=True))


def _batches(images_rgb: Sequence[NDArray[np.uint8]]) -> Iterator[list[NDArray[np.uint8]]]:
    """Split images into batches of at most `_MAX_BATCH_PIXELS`; a larger image is a batch of its own."""
    batch: list[NDArray[np.uint8]] = []
    num_pixels = 0
    for rgb in images_rgb:
        size = rgb.shape[0] * rgb.shape[1]
        if batch and num_pixels + size > _MAX_BATCH_PIXELS:
            yield batch
            batch, num_pixels = [], 0
        batch.append(rgb)
        num_pixels += size
    if batch:
        yield batch


def _halved(rgb: NDArray[np.uint8]) -> _Halvings:
    """Return an image and its halvings, whose shorter side is at least P-Net's window."""
    halvings = [rgb]
    while min(rgb.shape[:2]) >= 2 * _WINDOW_PX:
        height, width = rgb.shape[0] // 2, rgb.shape[1] // 2
        # An odd last row or column is left out: OpenCV takes ten times as long if the factor is not exactly 2.
        whole = rgb[: 2 * height, : 2 * width]
        rgb = np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
        halvings.append(rgb)
    return halvings


def _sheet(images: list[_Halvings], min_face_px: float) -> tuple[NDArray[np.uint8], list[_Tile]]:
    """Lay out all pyramid levels, each with its border, on one black sheet, (height, width, 3).

    The layout is first-fit decreasing: in order of height, each level goes onto the first shelf that has room. The
    tiles are in order of their owners, and those of an owner in order of their height.
    """
    levels = [
        (owner, halvings, height, width)
        for owner, halvings in enumerate(images)
        for height, width in _pyramid(halvings[0].shape, min_face_px)
    ]
    levels.sort(key=lambda level: -level[2])
    widths = [_even(width) + 2 * _BORDER_PX for _, _, _, width in levels]
    sheet_width = _round_up(max(max(widths, default=1), min(_SHEET_WIDTH_PX, sum(widths))), 64)
    shelves: list[tuple[int, int]] = []  # top and used width of each
    bottom = 0
    places = []
    for (_, _, height, _), width in zip(levels, widths, strict=True):
        number = next((n for n, (_, used) in enumerate(shelves) if used + width <= sheet_width), len(shelves))
        if number == len(shelves):
            shelves.append((bottom, 0))
            bottom += _even(height) + 2 * _BORDER_PX
        top, left = shelves[number]
        places.append((top + _BORDER_PX, left + _BORDER_PX))
        shelves[number] = top, left + width
    sheet = np.zeros((_round_up(bottom - _OVERLAP_PX, _STRIP_HEIGHT_PX) + _OVERLAP_PX, sheet_width, 3), np.uint8)
    tiles = []
    for (owner, halvings, height, width), (top, left) in zip(levels, places, strict=True):
        depth = max(sum(half.shape[0] >= height and half.shape[1] >= width for half in halvings) - 1, 0)
        source = halvings[depth]
        level = cv2.resize(source, (width, height), interpolation=cv2.INTER_LINEAR)
        sheet[top : top + height, left : left + width] = level
        to_image = (source.shape[1] * 2**depth / width, source.shape[0] * 2**depth / height)
        tiles.append(_Tile(owner, top, left, height, width, *to_image))
    return sheet, sorted(tiles, key=lambda tile: tile.owner)


def _tile_numbers(tiles: list[_Tile], sheet_shape: tuple[int, ...]) -> Tensor:
    """Return the index of the tile, border included, that contains each cell's window; -1 for none."""
    numbers = np.full((_num_cells(sheet_shape[0]), _num_cells(sheet_shape[1])), -1, np.int64)
    for number, tile in enumerate(tiles):
        row, column = (tile.top - _BORDER_PX) // _STRIDE_PX, (tile.left - _BORDER_PX) // _STRIDE_PX
        num_rows, num_columns = (_num_cells(_even(side) + 2 * _BORDER_PX) for side in (tile.height, tile.width))
        numbers[row : row + num_rows, column : column + num_columns] = number
    return torch.from_numpy(numbers)


def _pyramid(image_shape: tuple[int, ...], min_face_px: float) -> Iterator[tuple[int, int]]:
    """Yield the height and width of the pyramid's levels; in the first, P-Net's window is a face of `min_face_px`.

    In the last, the shorter side is at least half a window: the largest face found is twice as large as the image.
    """
    height, width, _ = image_shape
    scale = _WINDOW_PX / min_face_px
    for number in itertools.count(1):
        if min(height, width) * scale < _WINDOW_PX / 2:
            return
        yield math.ceil(height * scale), math.ceil(width * scale)
        scale *= _PYRAMID_FACTOR if number < _NUM_COARSE_LEVELS else math.sqrt(_PYRAMID_FACTOR)


def _num_cells(side_px: int) -> int:
    """Return the number of P-Net's cells along a side of an even number of pixels."""
    return (side_px - _OVERLAP_PX) // _STRIDE_PX


def _even(number: int) -> int:
    return number + number % 2


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _cut(
    images: list[_Halvings], squares: Tensor, owners: Tensor, side_px: int, *, finely: bool = False
) -> tuple[NDArray[np.uint8], Tensor]:
    """Crop squares and resize them to (k, side_px, side_px, 3); black outside the image.

    A square of at least `2 * side_px` is cropped from the half-size image, one of `4 * side_px` from the quarter-size
    image and so on. The second result is the squares (k, 4), rounded to whole pixels of those images. With `finely`,
    halving starts at `4 * side_px` and shrinking averages all pixels: slower, but landmarks move only two thirds as
    much.
    """
    crops = np.empty((len(squares), side_px, side_px, 3), np.uint8)
    places = _places(images, squares, owners, (4 if finely else 2) * side_px)
    for crop, owner, (depth, x0, y0, side) in zip(crops, owners.tolist(), places.tolist(), strict=True):
        rgb = images[owner][depth]
        height, width, _ = rgb.shape
        x1, y1 = x0 + side, y0 + side
        inside = rgb[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)]
        if inside.size == 0:
            crop[:] = 0
            continue
        if inside.shape[:2] != (side, side):
            beyond = (max(0, -y0), max(0, y1 - height), max(0, -x0), max(0, x1 - width))
            inside = cv2.copyMakeBorder(inside, *beyond, cv2.BORDER_CONSTANT)
        interpolation = cv2.INTER_AREA if finely and side > side_px else cv2.INTER_LINEAR
        cv2.resize(inside, (side_px, side_px), crop, interpolation=interpolation)
    corners, sides = places[:, 1:3], places[:, 3:]
    rounded = np.concatenate([corners, corners + sides], axis=1) << places[:, :1]
    return crops, torch.from_numpy(rounded.astype(np.float32))


def _places(images: list[_Halvings], squares: Tensor, owners: Tensor, max_side_px: int) -> NDArray[np.int64]:
    """Return where squares are cropped, (k, 4): the index of the halving, and left, top and side in its pixels.

    The halving is the first in which the side is less than `max_side_px`, or the smallest, if there is none.
    """
    corners = squares.numpy().astype(np.int64)
    sides = corners[:, 2:3] - corners[:, :1]
    num_halvings = np.array([len(halvings) for halvings in images])[owners.numpy()]
    bit_length = np.frexp(2 * sides[:, 0] // max_side_px)[1]
    depths = (bit_length - 1).clip(0, num_halvings - 1)[:, None]
    parts = np.concatenate([corners[:, :2], sides], axis=1) / 2.0**depths
    return np.concatenate([depths, parts.round().astype(np.int64)], axis=1)


def _regress(boxes: Tensor, regression: Tensor) -> Tensor:
    """Move each edge of the boxes by its regressed fraction of the box's width or height."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return boxes + regression * sides


def _square(boxes: Tensor) -> Tensor:
    """Grow each box around its centre to a square of its longer side, on whole pixels."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True)
    corners = (centres - sides / 2).round()
    return torch.cat([corners, corners + sides.round().clamp(min=1)], dim=1)


def _suppress(boxes: Tensor, scores: Tensor, groups: Tensor, max_iou: float) -> Tensor:
    """Suppress each box that overlaps a better one of its group; return the indices (k,) of the others, by group.

    Each group apart. To shift the boxes of each group, so that groups do not overlap, would be faster; but the shifts'
    rounding decides overlaps that are close to the limit, so the faces of an image would depend on the other images.

    Args:
        boxes: (n, 4), with sides of more than 0: of two boxes without area, OpenCV suppresses one, wherever they are.
        scores: (n,), more than 0. Of equal scores, the first is best.
        groups: (n,) ascending numbers.
        max_iou: largest intersection over union of two boxes that are kept.
    """
    left_top_sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    kept: list[int] = []
    first = 0
    for size in groups.bincount().tolist():
        own = slice(first, first + size)
        # OpenCV's function, because torchvision takes long to import: decision 52.
        kept += [first + place for place in cv2.dnn.NMSBoxes(left_top_sides[own], scores[own].tolist(), 0.0, max_iou)]
        first += size
    return torch.tensor(kept, dtype=torch.long)


def _suppress_contained(boxes: Tensor, scores: Tensor, owners: Tensor, max_overlap: float) -> Tensor:
    """Suppress each box that overlaps a better one of its image by more than `max_overlap` of the smaller box's area.

    Returns the indices (k,) of the other boxes, best first.
    """
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    remaining = scores.argsort(descending=True, stable=True)
    kept = []
    while len(remaining):
        best, rest = remaining[0], remaining[1:]
        kept.append(int(best))
        sides = torch.minimum(boxes[best, 2:], boxes[rest, 2:]) - torch.maximum(boxes[best, :2], boxes[rest, :2])
        overlaps = sides.clamp(min=0).prod(dim=1) / torch.minimum(areas[best], areas[rest])
        remaining = rest[(overlaps <= max_overlap) | (owners[rest] != owners[best])]
    return torch.tensor(kept, dtype=torch.long)
