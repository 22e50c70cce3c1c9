"""The settings that, besides the weights, determine the predictions for a photograph. A checkpoint stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Self

from agr_ray.config import PredictConfig, Section, VisionConfig
from agr_ray.config.section import rebuilt

DECISIVE: Final[Mapping[str, str]] = {
    "vision.detector": "it decides which faces are found and how they are aligned",
    "vision.min_face_px": "it decides which faces are found",
    "vision.min_score": "it decides which faces are found",
    "vision.max_side_px": "it decides which faces are found, and the resolution of their crops",
    "vision.small_faces": "it decides which faces are found, and the resolution of their crops",
    "vision.try_rotations": "it decides which faces are found",
    "predict.flip_average": "it changes every prediction",
    "predict.precision": "it changes every prediction",
}
"""Settings that a calibration depends on, and why. The others (`max_pixels`, `max_mib`) only decide which files are
rejected before a face is looked for."""


class Pipeline(Section):
    """Settings from a photograph's bytes to faces, and from the network's outputs to predictions."""

    vision: VisionConfig = VisionConfig()
    """How photographs become aligned faces."""
    predict: PredictConfig = PredictConfig()
    """How the network's outputs become predictions."""

    def decisive(self) -> dict[str, Any]:
        """Return the values of the keys of `DECISIVE`."""
        return {key: getattr(getattr(self, section), name) for key in DECISIVE for section, name in [key.split(".")]}

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return every setting as plain values, by section and key."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from the result of `to_json`; other keys of `values` are ignored.

        Raises:
            ValueError: a section or key is missing, unknown or has a value that is not allowed; one line.
        """
        return cls(
            vision=rebuilt(VisionConfig, values.get("vision"), "vision"),
            predict=rebuilt(PredictConfig, values.get("predict"), "predict"),
        )


DEFAULT_PIPELINE: Final = Pipeline()
