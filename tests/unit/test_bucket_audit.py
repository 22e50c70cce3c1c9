"""The audit of a bucket runs from photographs to verdicts, on a few rendered chips and without Ray."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path += [str(Path(__file__).parents[1] / "ray"), str(Path(__file__).parents[2] / "benchmarks")]
import bucket_audit
from bucket_audit import Commands, audit
from cropping_here import CroppingHere
from sets import checkpoint, chip_jpeg, drawn_chip
from this_process import ThisProcess

from agr_ray.config import PrepareJob, ScoreJob, VisionConfig
from agr_ray.config.pipeline import Pipeline
from agr_ray.console import make_console
from agr_ray.data.preparation import prepare_set
from agr_ray.evaluation import shift
from agr_ray.labels import GENDERS, UTKFACE
from agr_ray.runtime.evaluate import evaluate
from agr_ray.scoring.driver import score_input


@pytest.fixture
def chips(tmp_path: Path) -> Path:
    """Write rendered chips under UTKFace's names."""
    folder = tmp_path / "chips"
    folder.mkdir()
    for number in range(60):
        chip = drawn_chip(number)
        gender, race = 1 - GENDERS.index(chip.gender), UTKFACE.races.index(chip.race)
        (folder / f"{int(chip.age_years)}_{gender}_{race}_{number:017d}.jpg.chip.jpg").write_bytes(chip_jpeg(number))
    return folder


@pytest.mark.parametrize(("max_error", "num_failures"), [(1.0, 0), (-1.0, 3)])
def test_an_audit_says_what_is_wrong(
    tmp_path: Path, chips: Path, monkeypatch: pytest.MonkeyPatch, max_error: float, num_failures: int
) -> None:
    monkeypatch.setattr(shift, "MIN_FACES", 10)
    monkeypatch.setattr(bucket_audit, "SAME_PICTURE", 1.1)  # drawings are alike
    monkeypatch.setattr(bucket_audit, "MAX_ERROR", max_error)
    model = checkpoint(tmp_path / "model", train_images=[], pipeline=Pipeline(vision=VisionConfig(detector="haar")))

    def prepare(job: PrepareJob) -> None:
        prepare_set(job, CroppingHere(job), make_console(quiet=True))

    def score(job: ScoreJob) -> dict[str, object]:
        return score_input(job, ThisProcess(), make_console(quiet=True))

    failures = audit(
        model, chips, tmp_path / "work", 40, Commands(prepare, lambda job: evaluate(job, quiet=True), score)
    )

    counted = [failure for failure in failures if "distinct faces counted" in failure]
    assert len(counted) == num_failures
    assert len(list((tmp_path / "work" / "photographs").rglob("*.jpg"))) == 40


def test_near_duplicates_and_shifted_photographs_are_made_from_the_same_chip(chips: Path) -> None:
    path = sorted(chips.iterdir())[0]
    plain, shifted = (
        bucket_audit.photograph(path, np.random.default_rng(1), shifted=shifted) for shifted in (False, True)
    )

    assert plain.shape == shifted.shape == (bucket_audit.HEIGHT_PX, bucket_audit.WIDTH_PX, 3)
    assert (plain != shifted).any()
    copy = bucket_audit.near_duplicate(plain, np.random.default_rng(2))
    assert copy.dtype == np.uint8
    assert min(copy.shape[:2]) >= 0.6 * (bucket_audit.HEIGHT_PX - 16) - 1
