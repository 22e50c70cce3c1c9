"""Where an evaluation writes, and what it replaces there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agr_ray.config import EvaluateConfig
from agr_ray.config.pipeline import DEFAULT_PIPELINE
from agr_ray.errors import ConfigError
from agr_ray.report.evaluation_folder import out_folder
from agr_ray.storage import Storage

PREPARED: Any = SimpleNamespace(digest="0" * 64, split_manifest_sha256="1" * 64)


def folder_for(out: Path) -> str:
    config = EvaluateConfig(checkpoint="model", data="data", out=str(out))
    return out_folder(Storage(), config, "model", "digest", PREPARED, DEFAULT_PIPELINE)


def test_an_evaluation_that_was_killed_between_its_files_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "predictions.parquet").write_bytes(b"written before metrics.json")

    assert folder_for(tmp_path) == str(tmp_path)


def test_a_folder_with_other_files_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "predictions.parquet").write_bytes(b"")
    (tmp_path / "thesis.txt").write_bytes(b"")

    with pytest.raises(ConfigError, match="holds files, but no evaluation"):
        folder_for(tmp_path)
