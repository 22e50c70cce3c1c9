"""The MLflow run of a training run, if `train.mlflow_uri` is set. MLflow is imported only then."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from agr_ray.errors import ConfigError
from agr_ray.redact import redacted

EXPERIMENT: Final = "agr_ray"
TAG: Final = "agr_ray.run"
"""Tag of an MLflow run with the URI of our run, by which it is found again."""

_PARAMS_AT_ONCE: Final = 100
"""MLflow's limit for one request."""
_LONGEST_PARAM: Final = 500


def check_mlflow(mlflow_uri: str) -> None:
    """Reject a tracking server if the package mlflow is not installed.

    Raises:
        ConfigError: the package is missing.
    """
    if mlflow_uri and importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            f"train.mlflow_uri {redacted(mlflow_uri)}: needs the package mlflow, which is not installed: "
            "pip install 'mlflow>=3', on every node; or leave the key empty"
        )


class TrackedRun:
    """The MLflow run of one of our runs. Any process finds it by our run's URI, so a resumed run continues in it.

    Args:
        mlflow_uri: the tracking server.
        run_uri: of our run.
        settings: sections of the configuration, stored as parameters when the MLflow run is created.

    Raises:
        ConfigError: the server can't be reached, or rejects a request.
    """

    def __init__(self, mlflow_uri: str, run_uri: str, settings: Mapping[str, Mapping[str, Any]]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient(tracking_uri=mlflow_uri)
        self._failure = MlflowException
        self._uri = mlflow_uri
        try:
            experiment = self._client.get_experiment_by_name(EXPERIMENT)
            number = experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT)
            quoted = run_uri.replace("'", "\\'")
            runs = self._client.search_runs([number], filter_string=f"tags.`{TAG}` = '{quoted}'", max_results=1)
            if runs:
                self._id = runs[0].info.run_id
                # The last epoch that was logged, so that none is logged twice.
                self._logged = int(runs[0].data.metrics.get("epoch", 0))
            else:
                name = run_uri.rstrip("/").rpartition("/")[2]
                self._id = self._client.create_run(number, tags={TAG: run_uri}, run_name=name).info.run_id
                self._logged = 0
                params = [Param(key, value) for key, value in flat(settings).items()]
                for first in range(0, len(params), _PARAMS_AT_ONCE):
                    self._client.log_batch(self._id, params=params[first : first + _PARAMS_AT_ONCE])
        except MlflowException as error:
            raise ConfigError(f"train.mlflow_uri {redacted(mlflow_uri)}: {self._one_line(error)}") from None

    def log(self, history: Sequence[Mapping[str, Any]]) -> str:
        """Log the epochs that are not logged yet. Return an error as a text, for a warning; empty: no error.

        An error does not end training: history.parquet has everything, and the next call tries again.

        Args:
            history: rows of schema.HISTORY, of all epochs so far.
        """
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        try:
            for row in history:
                if row["epoch"] > self._logged:
                    metrics = [
                        Metric(key, float(value), now_ms, int(row["epoch"]))
                        for key, value in row.items()
                        if value is not None
                    ]
                    self._client.log_batch(self._id, metrics=metrics)
                    self._logged = int(row["epoch"])
        except self._failure as error:
            return f"MLflow: {self._one_line(error)}"
        return ""

    def finish(self, files: Sequence[str]) -> str:
        """Upload local files as artifacts and end the run; return an error as `log` does."""
        try:
            for path in files:
                self._client.log_artifact(self._id, path)
            self._client.set_terminated(self._id)
        except self._failure as error:
            return f"MLflow: {self._one_line(error)}"
        return ""

    def _one_line(self, error: Exception) -> str:
        """Return MLflow's error as one line, without the password that a quoted server URL may contain."""
        return redacted(" ".join(str(error).split()), self._uri)


def flat(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the values by dotted key, as text, truncated to MLflow's limit."""
    return {
        f"{section}.{key}": str(value)[:_LONGEST_PARAM]
        for section, values in settings.items()
        for key, value in values.items()
    }
