"""MTCNN: a cascade of three small nets that gives boxes and five landmarks.

Source: Zhang, Zhang, Li and Qiao, "Joint face detection and alignment using multitask cascaded convolutional
networks", 2016. The nets and their weights are facenet-pytorch's; the cascade about them is ours, because theirs
clips its crops at the image's border and then stretches them to a square, which moves the landmarks of tight chips.
Here all that lies beyond the image is black: P-Net sees half a window of it on every side, and crops keep their shape.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final

import cv2
import numpy as np
import torch
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.ops import batched_nms

from agr_ray.vision.detect import Faces

_PYRAMID_FACTOR: Final = 0.709
_WINDOW_PX: Final = 12  # what one output cell of P-Net sees
_STRIDE_PX: Final = 2  # between neighbouring cells
_BORDER_PX: Final = 6  # at every scale, so that a face is found with its centre on the image's border
_NMS_WITHIN_SCALE: Final = 0.5
_NMS_BETWEEN_STAGES: Final = 0.7

_MAX_BATCH_PIXELS: Final = 4_000_000  # of images stacked for P-Net: bounds memory, 12 bytes a pixel
_CHUNK: Final = 64  # candidates per pass of R-Net and O-Net: bounds memory, and keeps it in the CPU's cache
_FINAL_SHIFTS: Final = ((0.0, 0.0), (0.05, 0.05), (-0.05, 0.05), (0.05, -0.05), (-0.05, -0.05))  # of the face's side

_NO_BOXES: Final = torch.zeros((0, 4))


class Mtcnn:
    """The cascade on one device. A face's score is O-Net's probability."""

    name: Final = "mtcnn"

    def __init__(
        self,
        *,
        min_face_px: float = 40.0,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
        min_score: float = 0.0,
        device: str = "cpu",
    ) -> None:
        """Load the three nets' weights from the package; see `detect.make_detector` for the arguments."""
        self._device = torch.device(device)
        self._p_net, self._r_net, self._o_net = (
            # Channels last: three times as fast on a CPU, and the layout that decoded images have anyway.
            net().eval().to(self._device, memory_format=torch.channels_last)
            for net in (PNet, RNet, ONet)
        )
        self._min_face_px = min_face_px
        self._thresholds = thresholds
        self._min_score = min_score

    def detect(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Faces]:
        """Find the faces of each image (uint8, height x width x 3); images of equal size go through as one batch."""
        indices_by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, rgb in enumerate(images_rgb):
            indices_by_shape[rgb.shape].append(index)
        found: dict[int, Faces] = {}
        for (height, width, _), indices in indices_by_shape.items():
            batch_size = max(1, _MAX_BATCH_PIXELS // (height * width))
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                found.update(zip(batch, self._detect_batch([images_rgb[i] for i in batch]), strict=True))
        return [found[index] for index in range(len(images_rgb))]

    @torch.inference_mode()
    def _detect_batch(self, images_rgb: list[NDArray[np.uint8]]) -> list[Faces]:
        boxes, owners = self._propose(images_rgb)
        boxes, owners = self._refine(images_rgb, boxes, owners)
        boxes, scores, landmarks, owners = self._output(images_rgb, boxes, owners)
        faces = []
        for index in range(len(images_rgb)):
            mine = owners == index
            faces.append(Faces.sorted_by_score(boxes[mine].numpy(), scores[mine].numpy(), landmarks[mine].numpy()))
        return faces

    def _propose(self, images_rgb: list[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
        """Run P-Net over the pyramid; return square candidates (k, 4) and the index of the image (k,) of each."""
        images_nchw = torch.from_numpy(np.stack(images_rgb)).to(self._device).permute(0, 3, 1, 2).float()
        height, width = images_nchw.shape[2:]
        boxes, scores, regressions, owners = [_NO_BOXES], [_NO_BOXES[:, 0]], [_NO_BOXES], [_NO_BOXES[:, 0].long()]
        for scale in _pyramid_scales(height, width, self._min_face_px):
            level_height, level_width = math.ceil(height * scale), math.ceil(width * scale)
            level = functional.interpolate(images_nchw, (level_height, level_width), mode="area")
            regression_nchw, probability_nchw = self._p_net(_normalise(functional.pad(level, [_BORDER_PX] * 4)))

            mask = probability_nchw[:, 1] >= self._thresholds[0]
            cells = mask.nonzero().cpu()
            corners = cells[:, [2, 1]] * _STRIDE_PX - _BORDER_PX
            to_image = torch.tensor([width / level_width, height / level_height])
            level_boxes = torch.cat([corners * to_image, (corners + _WINDOW_PX) * to_image], dim=1)
            level_scores = probability_nchw[:, 1][mask].cpu()
            kept = batched_nms(level_boxes, level_scores, cells[:, 0], _NMS_WITHIN_SCALE)
            boxes.append(level_boxes[kept])
            scores.append(level_scores[kept])
            regressions.append(regression_nchw.permute(0, 2, 3, 1)[mask].cpu()[kept])
            owners.append(cells[kept, 0])
        boxes_k4, owners_k = torch.cat(boxes), torch.cat(owners)
        kept = batched_nms(boxes_k4, torch.cat(scores), owners_k, _NMS_BETWEEN_STAGES)
        return _square(_regress(boxes_k4[kept], torch.cat(regressions)[kept])), owners_k[kept]

    def _refine(self, images_rgb: list[NDArray[np.uint8]], boxes: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """Run R-Net over the candidates; return those that pass, regressed and square."""
        if len(boxes) == 0:
            return boxes, owners
        regression, probability = self._run(self._r_net, _crops(images_rgb, boxes, owners, 24))
        passed = probability[:, 1] > self._thresholds[1]
        boxes, owners = boxes[passed], owners[passed]
        kept = batched_nms(boxes, probability[passed, 1], owners, _NMS_BETWEEN_STAGES)
        return _square(_regress(boxes[kept], regression[passed][kept])), owners[kept]

    def _output(
        self, images_rgb: list[NDArray[np.uint8]], boxes: Tensor, owners: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run O-Net over the candidates; return boxes (k, 4), scores (k,), landmarks (k, 5, 2) and owners (k,).

        The landmarks depend on the cut by 2 to 3 % of the face, and P-Net's grid makes the first cut a matter of
        chance. So the faces that remain are cut again by the box that O-Net gave them, and then at five places about
        the next one, whose results are averaged: that halves the noise, at 2.5 ms a face.
        """
        boxes, scores, landmarks = self._output_once(images_rgb, boxes, owners)
        keep = (scores > self._thresholds[2]) & (scores >= self._min_score)
        boxes, scores, landmarks, owners = boxes[keep], scores[keep], landmarks[keep], owners[keep]
        kept = _suppress_contained(boxes, scores, owners, _NMS_BETWEEN_STAGES)
        boxes, scores, landmarks, owners = boxes[kept], scores[kept], landmarks[kept], owners[kept]
        if len(boxes):
            boxes, _, _ = self._output_once(images_rgb, _square(boxes), owners)
            squares = _square(boxes)
            shifts = torch.tensor(_FINAL_SHIFTS)[:, None, :] * (squares[:, 2:] - squares[:, :2])
            shifted = (squares + shifts.repeat(1, 1, 2)).round().reshape(-1, 4)
            boxes, _, landmarks = self._output_once(images_rgb, shifted, owners.repeat(len(_FINAL_SHIFTS)))
            boxes = boxes.reshape(len(_FINAL_SHIFTS), -1, 4).mean(dim=0)
            landmarks = landmarks.reshape(len(_FINAL_SHIFTS), -1, 5, 2).mean(dim=0)
        return boxes, scores, landmarks, owners

    def _output_once(
        self, images_rgb: list[NDArray[np.uint8]], squares: Tensor, owners: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if len(squares) == 0:
            return squares, squares[:, 0], squares.new_zeros((0, 5, 2))
        regression, points, probability = self._run(self._o_net, _crops(images_rgb, squares, owners, 48))
        fractions = points.reshape(-1, 2, 5).transpose(1, 2)  # the net gives five x, then five y
        landmarks = squares[:, None, :2] + fractions * (squares[:, 2:] - squares[:, :2])[:, None]
        return _regress(squares, regression), probability[:, 1], landmarks

    def _run(self, net: Callable[[Tensor], tuple[Tensor, ...]], crops_nhwc: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """Run a net over any number of crops, at least one; return its outputs on the CPU."""
        chunks = torch.split(torch.from_numpy(crops_nhwc).permute(0, 3, 1, 2), _CHUNK)
        outputs = [net(_normalise(chunk.to(self._device).float())) for chunk in chunks]
        return tuple(torch.cat(parts).cpu() for parts in zip(*outputs, strict=True))


def _pyramid_scales(height: int, width: int, min_face_px: float) -> list[float]:
    """Return the scales at which a face of P-Net's window is `min_face_px` and larger in the image.

    The last is the one at which the window would be larger than the image with its border.
    """
    scales = []
    scale = _WINDOW_PX / min_face_px
    while min(height, width) * scale + 2 * _BORDER_PX >= _WINDOW_PX + _BORDER_PX:
        scales.append(scale)
        scale *= _PYRAMID_FACTOR
    return scales


def _normalise(pixels: Tensor) -> Tensor:
    """Map 0..255 to about -1..1, as the nets were trained."""
    return (pixels - 127.5) / 128


def _crops(images_rgb: list[NDArray[np.uint8]], boxes: Tensor, owners: Tensor, side_px: int) -> NDArray[np.uint8]:
    """Cut square candidates and bring them to `side_px`, (k, side, side, 3); black beyond the image.

    One by one with OpenCV: on a CPU that takes a quarter of the time of `torchvision.ops.roi_align` over all at once.
    """
    crops = np.empty((len(boxes), side_px, side_px, 3), np.uint8)
    for crop, box, owner in zip(crops, boxes.int().tolist(), owners.tolist(), strict=True):
        rgb = images_rgb[owner]
        height, width = rgb.shape[:2]
        x0, y0, x1, y1 = box
        inside = rgb[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)]
        beyond = (max(0, -y0), max(0, y1 - height), max(0, -x0), max(0, x1 - width))
        if inside.size == 0:
            crop[:] = 0
            continue
        if any(beyond):
            inside = cv2.copyMakeBorder(inside, *beyond, cv2.BORDER_CONSTANT)
        shrinks = x1 - x0 > side_px
        cv2.resize(inside, (side_px, side_px), crop, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return crops


def _regress(boxes: Tensor, regression: Tensor) -> Tensor:
    """Move each edge of the boxes by its regressed fraction of the box's width or height."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return boxes + regression * sides


def _square(boxes: Tensor) -> Tensor:
    """Grow each box about its centre to a square of its longer side, on whole pixels."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True)
    corners = (centres - sides / 2).round()
    return torch.cat([corners, corners + sides.round().clamp(min=1)], dim=1)


def _suppress_contained(boxes: Tensor, scores: Tensor, owners: Tensor, max_overlap: float) -> Tensor:
    """Keep the best of those of an image's boxes that overlap by more than `max_overlap` of the smaller.

    Returns the indices (k,) of those kept.
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
