"""Rendered synthetic faces: labelled chips and photographs for demos, tests and benchmarks.

They are drawn with numpy and OpenCV, in any number, and depend only on the seed. Each label of a face affects several
continuous cues in the face and the hair, and nothing else.
"""

from agr_ray.data.rendered.scene import (
    MIN_FACE_WIDTH_PX,
    Pose,
    RenderedChip,
    RenderedFace,
    RenderedPhotograph,
    chip_labels_table,
    head_mask,
    iter_chips,
    photograph_labels_table,
    render_chip,
    render_photograph,
)
from agr_ray.data.rendered.traits import AGE_FIRST_YEARS, AGE_LAST_YEARS, Labels

__all__ = [
    "AGE_FIRST_YEARS",
    "AGE_LAST_YEARS",
    "MIN_FACE_WIDTH_PX",
    "Labels",
    "Pose",
    "RenderedChip",
    "RenderedFace",
    "RenderedPhotograph",
    "chip_labels_table",
    "head_mask",
    "iter_chips",
    "photograph_labels_table",
    "render_chip",
    "render_photograph",
]
