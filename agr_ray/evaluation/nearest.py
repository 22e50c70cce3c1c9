"""The training image that each measured image is most like: by the network's features, and by its perceptual hash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.vision.perceptual_hash import NUM_BITS, hash_distance

_ROWS_AT_ONCE: Final = 2048


class Nearest:
    """The nearest of all rows passed to `update`, which may come in any order and in parts.

    Features are compared by the cosine of their difference from the mean of the measured images: features after a ReLU
    are never negative, so without that all cosines would be near 1.

    Args:
        features: (n, d) of the measured images.
        hashes: (n,) their perceptual hashes.
    """

    def __init__(self, features: NDArray[np.floating], hashes: NDArray[np.uint64]) -> None:
        self._mean = features.astype(np.float32).mean(axis=0)
        self._features = self._normalised(features)
        self._hashes = hashes
        self.cosine = np.full(len(features), -np.inf, np.float32)
        """(n,) of the nearest row by features."""
        self.by_features = [""] * len(features)
        """Its image_id."""
        self.distance_bits = np.full(len(features), NUM_BITS + 1, np.int64)
        """(n,) bits in which the hash differs from that of the nearest row by hash."""
        self.by_hash = [""] * len(features)
        """Its image_id."""

    def update(self, image_ids: Sequence[str], features: NDArray[np.floating], hashes: NDArray[np.uint64]) -> None:
        """Compare with m more rows; of equally near ones, the image_id that sorts first wins.

        Args:
            image_ids: of the rows.
            features: (m, d).
            hashes: (m,).
        """
        order = np.argsort(np.asarray(image_ids, dtype=object), kind="stable")
        normalised = self._normalised(features[order])
        for first in range(0, len(self._features), _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            cosines = self._features[part] @ normalised.T
            distances = hash_distance(self._hashes[part, None], hashes[order][None])
            nearest, likest = cosines.argmax(axis=1), distances.argmin(axis=1)
            for row, (a, b) in enumerate(zip(nearest, likest, strict=True)):
                place, by_features, by_hash = first + row, image_ids[order[a]], image_ids[order[b]]
                better = (-cosines[row, a], by_features) < (-self.cosine[place], self.by_features[place])
                if better:
                    self.cosine[place], self.by_features[place] = cosines[row, a], by_features
                if (int(distances[row, b]), by_hash) < (int(self.distance_bits[place]), self.by_hash[place]):
                    self.distance_bits[place], self.by_hash[place] = distances[row, b], by_hash

    def _normalised(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        centred = features.astype(np.float32) - self._mean
        lengths = np.linalg.norm(centred, axis=1, keepdims=True)
        return np.asarray(centred / np.where(lengths > 0.0, lengths, 1.0), np.float32)
