"""The study of a sweep in a bucket is kept only in the bucket and in the driver's memory."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
from commands import ROOT
from seaweedfs import S3Server

from agr_ray.config import TuneConfig
from agr_ray.storage import Connection, Storage
from agr_ray.tuning.study import Study

sys.path.append(str(ROOT / "tests" / "unit"))
from sweeps import SPACE


@pytest.mark.usefixtures("s3_environment")
def test_a_study_in_a_bucket_leaves_nothing_on_the_disk(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = Storage(Connection(endpoint_url=s3_server.endpoint_url))
    uri = "s3://tests/sweeps/lite"

    def opened() -> Study:
        return Study(storage, uri, "id", TuneConfig(space=SPACE, random_trials=3), ("age",), "lite")

    first = opened()
    asked = first.ask(0)
    first.save()
    again = opened()

    assert list(again._ids) == [0]
    assert again._study.trials[0].params == asked
    assert list(tmp_path.iterdir()) == []
