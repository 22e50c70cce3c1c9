"""The calibration that a checkpoint holds."""

from __future__ import annotations

from pathlib import Path

from agr_ray.config import PredictConfig, digest
from agr_ray.errors import ConfigError
from agr_ray.evaluation.calibration import Calibration
from agr_ray.models.checkpoint import CALIBRATION, CheckpointError, model_digest, read_calibration_json


def read_calibration(directory: Path, config: PredictConfig, key: str) -> tuple[Calibration | None, str]:
    """Return the checkpoint's calibration, or None and the reason why there is none that can be used.

    Args:
        directory: as `local_checkpoint` gives it.
        config: how the network's outputs are to become predictions: calibration holds under the same settings only.
        key: of the configuration, that names the checkpoint.

    Raises:
        ConfigError: calibration.json is damaged, or of another format.
    """
    try:
        said = read_calibration_json(directory)
        if said is None:
            how = "jobs/evaluate.py --evaluate.split val --calibrate writes it"
            return None, f"the checkpoint has no {CALIBRATION}; {how}"
        calibration = Calibration.from_json(said)
    except CheckpointError as error:
        raise ConfigError(f"{key}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{key}: {CALIBRATION}: {error}") from None
    if calibration.model_digest != model_digest(directory):
        return None, f"the checkpoint's {CALIBRATION} belongs to another model; calibrate again"
    if calibration.predict_digest != digest(config):
        how = "give the recipe that it was fitted with, or calibrate again"
        return None, f"the checkpoint's {CALIBRATION} was fitted under other predict settings; {how}"
    return calibration, ""
