"""Scoring's workers without Ray: this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image

from agr_ray.config import GatesConfig, PredictConfig, VisionConfig
from agr_ray.models.checkpoint import load_checkpoint
from agr_ray.models.checkpoint_files import portable_checkpoint
from agr_ray.scoring.publish import Counts, Publication
from agr_ray.scoring.scorer import PartScorer, RowPredictor, Scoring
from agr_ray.storage import Storage


class ThisProcess:
    """Workers that are this process."""

    num_workers = 1

    def __init__(self, predictor: RowPredictor) -> None:
        self._predictor = predictor

    def session(self) -> AbstractContextManager[None]:
        return nullcontext()

    def score(self, scoring: Scoring, parts: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        scorer = PartScorer(scoring, self._predictor)
        for part in parts:
            yield scorer.score(part)

    def publish(self, publication: Publication) -> Iterator[Counts]:
        for file in range(publication.num_files):
            yield publication.publish_file(file)

    @classmethod
    def of(cls, model: Path) -> ThisProcess:
        """Load a checkpoint, and what else takes its time, once."""
        Image.init()
        scoring = Scoring(
            storage=Storage(),
            work="",
            vision=VisionConfig(detector="haar"),
            gates=GatesConfig(),
            predict=PredictConfig(),
            attributes=("age", "gender", "race"),
            batch_size=2,
            outage_s=0.0,
            transform=load_checkpoint(model).transform,
            checkpoint=portable_checkpoint(model),
            calibration=None,
            provenance={},
            use_gpu=False,
        )
        return cls(RowPredictor(scoring))
