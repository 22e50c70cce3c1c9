"""A checkpoint ready for use: the only way from a photograph to faces, and from crops to attributes.

    bytes -> FaceFinder: decode, detect, align -> crops -> AttributePredictor: network, calibration -> attributes

The halves can run in different processes. Scoring does so with GPUs: finders on CPUs, predictors on GPUs. Evaluation
runs the second half alone, on the crops of a prepared set.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch

from agr_ray.config.pipeline import DEFAULT_PIPELINE, Pipeline
from agr_ray.models.checkpoint_files import local_checkpoint
from agr_ray.predict.attributes import AttributePredictor, attribute_columns
from agr_ray.predict.face_finder import FaceFinder, Reject
from agr_ray.predict.resolve import Resolved, resolve
from agr_ray.storage import Storage


class FaceModel:
    """Finds the faces of photographs and predicts their attributes.

    Args:
        finder: the first half.
        predictor: the second half, for crops of the finder's side and margin.
        resolved: the settings that both have, and the calibration.
    """

    def __init__(self, finder: FaceFinder, predictor: AttributePredictor, resolved: Resolved) -> None:
        self.finder = finder
        self.predictor = predictor
        self.resolved = resolved

    @classmethod
    def load(
        cls,
        uri: str,
        *,
        device: torch.device | str = "cpu",
        overrides: Pipeline = DEFAULT_PIPELINE,
        allow_uncalibrated: bool = False,
        storage: Storage | None = None,
    ) -> Self:
        """Load a checkpoint.

        Args:
            uri: path or URI of its directory.
            device: of the network; detection stays on the CPU.
            overrides: settings to use instead of the checkpoint's: only fields that were set explicitly count, as in
                `Pipeline(vision=VisionConfig(min_face_px=20))`.
            allow_uncalibrated: allow overrides that the calibration depends on, and discard it if there are any.
            storage: where the checkpoint is; None: with default settings.

        Raises:
            ConfigError: there is no such checkpoint, or an override is rejected.
        """
        with local_checkpoint(storage or Storage(), uri, "checkpoint") as checkpoint:
            resolved = resolve(checkpoint, overrides, key="checkpoint", allow_uncalibrated=allow_uncalibrated)
        pipeline, transform = resolved.pipeline, checkpoint.transform
        finder = FaceFinder(pipeline.vision, transform.crop_side_px, transform.margin)
        model = checkpoint.model.to(device)
        predictor = AttributePredictor(model, transform, pipeline.predict, resolved.calibration)
        if resolved.calibration is not None:
            warning = resolved.calibration.precision_warning([predictor.precision])
            if warning:
                warnings.warn(f"checkpoint {uri}: {warning}", stacklevel=2)
        return cls(finder, predictor, resolved)

    def predict(self, bodies: Sequence[bytes]) -> list[list[dict[str, Any]] | Reject]:
        """Return the faces of each image file, from left to right, or why it was rejected.

        A face has the columns of schema.FACE except `flags`, as a scoring run writes them. Attributes without a head,
        and intervals without a calibration, are missing.
        """
        found = [each if isinstance(each, Reject) else self.finder.faces(each) for each in self.finder.find(bodies)]
        faces = [face for each in found if not isinstance(each, Reject) for face in each]
        attributes: Iterator[dict[str, Any]] = iter(())
        if faces:
            predicted = self.predictor.attributes(np.stack([face.crop for face in faces]))
            attributes = iter(pa.table(attribute_columns(predicted, len(faces), self.predictor.space)).to_pylist())
        return [
            each if isinstance(each, Reject) else [face.columns | next(attributes) for face in each] for each in found
        ]
