"""The metrics that a node serves to Prometheus have exactly the counts of the scored photographs."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from sets import checkpoint

from agr_ray.config import ScoreConfig, ScoreJob, VisionConfig
from agr_ray.config.pipeline import Pipeline
from agr_ray.data.rendered import render_chip
from agr_ray.runtime.score import score
from agr_ray.vision.decode import encode_jpeg

pytestmark = pytest.mark.usefixtures("ray_cluster")

Samples = list[tuple[str, dict[str, str], float]]
TIMEOUT_S = 60.0


def samples(output: str) -> Samples:
    """Return our metrics of all nodes for one output: name, labels of interest, and value."""
    found: Samples = []
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=20) as answer:
            families = [*text_string_to_metric_families(answer.read().decode())]
        for family in families:
            for each in family.samples:
                if each.name.startswith("ray_agr_ray_") and each.labels["output"] == output:
                    found.append((each.name.removeprefix("ray_agr_ray_"), dict(each.labels), each.value))
    return found


def wait_for(output: str, is_there: Callable[[Samples], bool]) -> Samples:
    """Return the latest samples as soon as the node has the wanted ones; processes send theirs every 10 s."""
    until_s = time.monotonic() + TIMEOUT_S
    latest: dict[tuple[Any, ...], tuple[str, dict[str, str], float]] = {}  # a node drops a gauge after 20 s
    while True:
        latest |= {(name, *sorted(labels.items())): (name, labels, number) for name, labels, number in samples(output)}
        found = [*latest.values()]
        if is_there(found) or time.monotonic() > until_s:
            return found
        time.sleep(1.0)


def value(found: Samples, name: str, **labels: str) -> list[float]:
    return [number for each, theirs, number in found if each == name and labels.items() <= theirs.items()]


def test_the_endpoint_has_the_counts_of_a_scoring_run(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", pipeline=Pipeline(vision=VisionConfig(detector="haar")))
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(encode_jpeg(render_chip(0, number).image_rgb))
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no image")
    job = ScoreJob(
        vision=VisionConfig(detector="haar"),
        score=ScoreConfig(
            checkpoint=str(model), input=str(tmp_path / "in"), out=str(tmp_path / "out"), num_workers=1, rows_per_file=2
        ),
    )

    began_s = time.time()
    record: dict[str, Any] = score(job)
    found = wait_for(job.score.out, lambda each: bool(value(each, "last_published_timestamp_seconds")))

    assert record["counts"] == {"not_an_image": 1, "ok": 3}
    assert record["num_faces"] >= 3
    assert {labels["command"] for _, labels, _ in found} == {"score"}
    counted = {labels["status"]: number for name, labels, number in found if name == "images_total"}
    assert counted == record["counts"]
    assert value(found, "faces_total") == [record["num_faces"]]
    for stage in ("decode", "align", "predict"):
        assert value(found, "image_stage_seconds_count", stage=stage) == [2]  # parts
    assert value(found, "parts", state="waiting") == value(found, "parts", state="in_flight") == [0]
    (published_s,) = value(found, "last_published_timestamp_seconds")
    (finished_s,) = value(found, "last_finished_timestamp_seconds")
    assert began_s < published_s < finished_s < time.time()

    assert score(job) == record  # nothing is new
    found = wait_for(
        job.score.out, lambda each: value(each, "last_finished_timestamp_seconds") not in ([], [finished_s])
    )

    assert value(found, "last_published_timestamp_seconds") == [published_s]
    assert finished_s < value(found, "last_finished_timestamp_seconds")[0] < time.time()
