"""The folder of an evaluation's results: predictions.parquet and, written last, metrics.json."""

from __future__ import annotations

import json
from typing import Any, Final

from agr_ray.config import EvaluateConfig
from agr_ray.config import digest as digest_of
from agr_ray.config.pipeline import Pipeline
from agr_ray.data.prepared import PreparedSet
from agr_ray.errors import ConfigError
from agr_ray.storage import MissingObject, Storage

FORMAT_VERSION: Final = 3
"""Of metrics.json."""
METRICS_FILE: Final = "metrics.json"
PREDICTIONS_FILE: Final = "predictions.parquet"


def is_evaluation(storage: Storage, uri: str) -> bool:
    """Return whether the folder holds the results of an evaluation."""
    return all(storage.exists(storage.join(uri, name)) for name in (METRICS_FILE, PREDICTIONS_FILE))


def read_metrics(storage: Storage, uri: str) -> dict[str, Any]:
    """Return the content of an evaluation's metrics.json.

    Raises:
        ConfigError: it can't be read, or is of another format.
    """
    path = storage.join(uri, METRICS_FILE)
    try:
        content = json.loads(storage.read(path))
        version = content["evaluation"]["format_version"]
    except MissingObject:
        raise ConfigError(f"{uri}: no evaluation; there is no {METRICS_FILE}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: not written by agr-ray evaluate, or damaged; evaluate again") from None
    if version != FORMAT_VERSION:
        raise ConfigError(f"{path}: has format_version {version!r}, expected {FORMAT_VERSION}; evaluate again")
    return dict(content)


def out_folder(
    storage: Storage, config: EvaluateConfig, checkpoint: str, model: str, prepared: PreparedSet, pipeline: Pipeline
) -> str:
    """Return the folder of the results; the same evaluation replaces itself there.

    Raises:
        ConfigError: the configured one holds something else.
    """
    if not config.out:
        return f"{checkpoint}-eval-{config.split}-{prepared.digest[:8]}-{digest_of(pipeline.predict)[:4]}"
    out = storage.absolute(config.out).rstrip("/")
    try:
        existing = json.loads(storage.read(storage.join(out, METRICS_FILE)))["evaluation"]
        theirs = tuple(existing[name] for name in ("model_digest", "split_manifest_sha256", "split", "predict"))
        title = f"the evaluation of {existing['checkpoint']} on split {existing['split']} of {existing['data']}"
    except MissingObject:
        # A job that was killed while it wrote has left no metrics.json, which is written last.
        if not storage.exists(out) or all(info.key == PREDICTIONS_FILE for info in storage.list(out)):
            return out
        theirs, title = (), "files, but no evaluation"
    except (ValueError, KeyError, TypeError):
        theirs, title = (), "a metrics.json that no evaluation wrote"
    if theirs != (model, prepared.split_manifest_sha256, config.split, pipeline.predict.model_dump(mode="json")):
        raise ConfigError(f"evaluate.out {out}: holds {title}; choose another folder")
    return out
