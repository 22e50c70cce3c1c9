"""The record of a scoring run, which publishes it: `_SUCCESS/run=ID.json`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from agr_ray.config import ScoreJob
from agr_ray.evaluation.shift import compare
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
