"""The record of a scoring run, which publishes it: `_SUCCESS/run=ID.json`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from agr_ray.config import ScoreJob
from agr_ray.evaluation.calibration import Calibration
from agr_ray.evaluation.shift import compare
from agr_ray.models.card import measured_in
from agr_ray.schema import SCHEMA_VERSION
from agr_ray.scoring.loaded_model import ModelFiles
from agr_ray.scoring.planning import Plan
from agr_ray.scoring.publish import Counts, Publication
from agr_ray.scoring.unpublished import now
from agr_ray.tables.duplicates import DistinctFaces


def run_record(
    job: ScoreJob,
    publication: Publication,
    model: ModelFiles,
    config_digest: str,
    precisions: set[str],
    timings: Mapping[str, Any],
    totals: Mapping[str, Any],
    shift: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of `_SUCCESS/run=ID.json`."""
    return {
        "run_id": publication.run_id,
        "started_at": publication.started_at.isoformat(timespec="milliseconds"),
        **({} if publication.key else {"input": publication.storage.absolute(job.score.input)}),
        "model_digest": model.digest,
        "model": described_model(model.meta, model.calibration, model.card),
        "config_digest": config_digest,
        "key_id": key_id(publication.key),
        "schema_version": SCHEMA_VERSION,
        "label_space": model.space.to_json(),
        **model.pipeline.to_json(),
        "calibrated": model.calibration is not None,
        "uncalibrated_because": model.uncalibrated_because,
        "calibration_warning": model.calibration.overlap_warning if model.calibration else "",
        "precisions": sorted(precisions),
        "aggregate_only": job.score.aggregate_only,
        "group_by": list(job.score.group_by),
        "near_duplicates": job.score.near_duplicates,
        "min_cell": job.score.min_cell,
        **({} if job.score.min_cell else totals),
        "shift": shift,
        "timings": timings,
        "published_at": now().isoformat(timespec="milliseconds"),
    }


_MEASURED: Final = (
    ("age", "mae_years"),
    ("age", "exact_group"),
    ("gender", "accuracy"),
    ("race", "accuracy"),
)


_TITLES: Final = ("age MAE", "in the right age group", "gender accuracy", "race accuracy")


def described_model(meta: Mapping[str, Any], calibration: Calibration | None, card: str = "") -> dict[str, Any]:
    """Return what is known of a model's errors, as plain values. A key is missing if nothing is known.

    Keys: `trained_on`: `source`, and `num_images`; `measured`: evaluations on other images, see `card.measured_in`;
    `validation`: for each metric `value`, `baseline` (the constant baseline's) and `num_images`; `calibration`:
    `num_images`, and for gender and race the shares `abstained` (of the labelled calibration images) and `error` (of
    those on which the model does not abstain; None: there are none).

    Args:
        meta: content of the checkpoint's meta.json.
        calibration: of the run.
        card: the checkpoint's model card.
    """
    described: dict[str, Any] = {}
    data, val = meta["data"], meta["metrics"].get("val") or {}
    if data.get("source"):
        described["trained_on"] = {"source": data["source"], "num_images": data.get("num_train_rows")}
    measured = {
        f"{task}_{key}": {
            "value": val[task][key],
            "baseline": ((val.get("baseline") or {}).get(task) or {}).get(key),
            "num_images": val[task]["n"],
        }
        for task, key in _MEASURED
        if (val.get(task) or {}).get(key) is not None
    }
    if measured:
        described["validation"] = measured
    evaluations = measured_in(card, _TITLES)
    if evaluations:
        described["measured"] = evaluations
    if calibration is not None:
        described["calibration"] = {
            "num_images": calibration.n,
            **{task: _abstention(calibration, task) for task in ("gender", "race") if getattr(calibration, task)},
        }
    return described


def _abstention(calibration: Calibration, task: str) -> dict[str, Any]:
    truth, predicted = (calibration.rows[name][calibration.rows[task] >= 0] for name in (task, f"{task}_pred"))
    accepted = predicted >= 0
    wrong = (predicted != truth)[accepted]
    return {
        "abstained": float(1.0 - accepted.mean()),
        "error": float(wrong.mean()) if len(wrong) else None,
    }


def compared_faces(job: ScoreJob, model: ModelFiles, counts: Counts) -> dict[str, Any]:
    """Return the comparison of the run's faces with those of the calibration, as plain values."""
    if model.calibration is None:
        reference, because = None, model.uncalibrated_because
    else:
        reference, because = model.calibration.reference, "no face was detected in them"
    return compare(reference, counts.bins, because).to_json(hides_counts=bool(job.score.min_cell))


def totals_of(counts: Counts, distinct: DistinctFaces | None, plan: Plan) -> dict[str, Any]:
    """Return the run's counts over all groups, and the counts of its plan."""
    names = [name for name in counts.groups.column_names if name.startswith("num_")]
    totals: dict[str, Any] = {name: int(np.sum(counts.groups[name].to_numpy())) for name in names}
    totals["num_unique"] = None if distinct is None else int(distinct.per_group()[-1])
    return totals | {"counts": dict(sorted(counts.statuses.items())), "plan": dataclasses.asdict(plan)}


def key_id(key: bytes) -> str:
    """Return an id that distinguishes keys without revealing them."""
    return hashlib.sha256(b"agr_ray key id" + key).hexdigest()[:12] if key else ""
