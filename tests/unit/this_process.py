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
from agr_ray.schema import SCHEMA_VERSION
from agr_ray.scoring.publish import Counts, Publication
from agr_ray.scoring.scorer import PartScorer, RowPredictor, Scoring
from agr_ray.storage import Storage

PROVENANCE = {"run_id": "run", "model_digest": "model", "config_digest": "config", "schema_version": SCHEMA_VERSION}


class ThisProcess:
    """Workers that are this process."""

    num_workers = 1

    def __init__(self, predictor: RowPredictor | None = None) -> None:
        """Without a predictor, load the network for every call of `score`."""
        self._predictor = predictor

    def session(self, num_photographs: int) -> AbstractContextManager[None]:
        return nullcontext()

    def score(self, scoring: Scoring, parts: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        scorer = PartScorer(scoring, self._predictor)
        for part in parts:
            yield scorer.score(part)

    def stage(self, publication: Publication) -> Iterator[Counts]:
        for file in range(publication.num_files):
            yield publication.stage_file(file)

    @classmethod
    def of(cls, model: Path) -> ThisProcess:
        """Load a checkpoint, and what else takes its time, once."""
        Image.init()
        return cls(RowPredictor(scoring_of(model)))


def scoring_of(model: Path, work: Path | str = "", **changes: Any) -> Scoring:
    """Return the workers' task of a run that scores with this checkpoint, uncalibrated."""
    settings = {
        "storage": Storage(),
        "work": str(work),
        "vision": VisionConfig(detector="haar"),
        "gates": GatesConfig(),
        "predict": PredictConfig(),
        "attributes": ("age", "gender", "race"),
        "batch_size": 4,
        "outage_s": 0.0,
        "transform": load_checkpoint(model).transform,
        "checkpoint": portable_checkpoint(model),
        "calibration": None,
        "provenance": PROVENANCE,
        "use_gpu": False,
    }
    return Scoring(**settings | changes)
