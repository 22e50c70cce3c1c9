"""Scoring's workers without Ray: this process; and the fixtures `model` and `workers`.

A file that uses the fixtures imports them and names them in `__all__`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from sets import checkpoint

from agr_ray.config import GatesConfig, PredictConfig, VisionConfig
from agr_ray.config.pipeline import Pipeline
from agr_ray.models.checkpoint import WEIGHTS, Checkpoint, read_checkpoint
from agr_ray.models.checkpoint_files import portable_checkpoint
from agr_ray.models.checkpoint_network import given_network
from agr_ray.schema import SCHEMA_VERSION
from agr_ray.scoring import driver
from agr_ray.scoring.publish import Counts, Publication
from agr_ray.scoring.scorer import PartScorer, RowPredictor, Scoring
from agr_ray.storage import Storage

PROVENANCE = {"run_id": "run", "model_digest": "model", "config_digest": "config", "schema_version": SCHEMA_VERSION}

_CHECKED: set[str] = set()


def _check_network(checkpoint: Checkpoint, uri: str, key: str) -> None:
    """Check each network once, in this process. Another one would take seconds, for each of hundreds of jobs."""
    if not (checkpoint.directory / WEIGHTS).exists() or checkpoint.digest not in _CHECKED:
        given_network(checkpoint, uri, key)
        _CHECKED.add(checkpoint.digest)


driver.check_network = _check_network


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

    def finished(self, record: Mapping[str, Any]) -> None:
        pass

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
        "transform": read_checkpoint(model).transform,
        "checkpoint": portable_checkpoint(model),
        "calibration": None,
        "provenance": PROVENANCE,
        "use_gpu": False,
    }
    return Scoring(**settings | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of random weights that detects faces with the Haar cascade, which needs no network."""
    stored = Pipeline(vision=VisionConfig(detector="haar"))
    return checkpoint(tmp_path_factory.mktemp("model") / "model", pipeline=stored)


@pytest.fixture(scope="module")
def workers(model: Path) -> ThisProcess:
    """Return workers that have loaded `model`."""
    return ThisProcess.of(model)
