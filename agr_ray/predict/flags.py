"""Flags: reasons not to trust a face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agr_ray.config import GatesConfig


def flags(face: Mapping[str, Any], gates: GatesConfig) -> list[str]:
    """Return those of schema.FLAGS that apply to a face, in that order. A face without landmarks is never `turned`.

    Args:
        face: columns of schema.FACE.
        gates: limits beyond which a face is flagged.
    """
    x0, y0, x1, y1 = face["box"]
    turn = max(abs(face.get("yaw") or 0.0), abs(face.get("pitch") or 0.0))
    found = {
        "small": min(x1 - x0, y1 - y0) < gates.min_side_px,
        "blurred": face["sharpness"] < gates.min_sharpness,
        "turned": turn > gates.max_turn_degrees,
        "unsure": face["detector_score"] < gates.min_detector_score,
    }
    return [name for name, holds in found.items() if holds]
