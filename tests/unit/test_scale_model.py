"""The model of how scoring scales, without any run."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import scale_model
from scale_model import Cluster, Costs, Load, Requests, predict
from scale_runs import costs_of_run

COSTS = Costs(
    node_start_s=8.0,
    start_s=10.0,
    plan_key_s=0.001,
    worker_start_s=5.0,
    worker_start_cores=1.0,
    stages_s={"detect": 0.03, "predict": 0.02},
    part_s=1.0,
    scoring_cores=1.25,
    driver_part_s=0.01,
    publish_start_s=3.0,
    publish_row_s=0.0001,
    finish_s=2.0,
    faces_per_image=0.0,
    driver_mib=500.0,
    part_requests=Requests(get=4, put=2, delete=1),
    file_requests=Requests(get=1280, put=4, list=256),
)
SMALL = Load(1000, rows_per_part=100)
LARGE = Load(1_000_000)
DELETIONS_S = 10 / 3500


def test_a_run_with_one_worker_by_hand() -> None:
    # 10 parts of 100 x 0.05 s + 1 s; publishing writes 1,000 rows and deletes 10 parts.
    assert predict(COSTS, SMALL, Cluster(1)).steps_s == pytest.approx(
        {
            "start": 10.0,
            "planning": 1.0,
            "start of workers": 5.0,
            "workers": 60.0,
            "publishing": 3.0 + 0.1 + DELETIONS_S + 2.0,
        }
    )
    assert predict(COSTS, SMALL, Cluster(1)).seconds == pytest.approx(81.1 + DELETIONS_S)


def test_four_workers_share_two_cores() -> None:
    steps_s = predict(COSTS, SMALL, Cluster(4, cores=2)).steps_s

    # 4 x 1 core to start, so twice 5 s; 4 x 1.25 cores to score, so 2.5 times 3 rounds of 6 s.
    assert (steps_s["start of workers"], steps_s["workers"]) == pytest.approx((10.0, 45.0))


def test_workers_with_a_core_each_are_not_slower() -> None:
    assert predict(COSTS, SMALL, Cluster(4)).steps_s["workers"] == pytest.approx(18.0)


def test_each_wave_of_parts_starts_workers() -> None:
    parts = scale_model.MAX_BLOCKS + 1

    steps_s = predict(COSTS, Load(parts * 100, 100), Cluster(parts)).steps_s

    assert steps_s["start of workers"] == pytest.approx(2 * 5.0)
    assert "workers" not in steps_s  # the driver's 41 s are more than two rounds of 6 s


def test_latency_is_hidden_while_eight_downloads_suffice() -> None:
    def score_s(latency_s: float) -> float:
        return predict(COSTS, SMALL, Cluster(1, latency_s=latency_s)).steps_s["workers"]

    # Each part also waits for its seven requests.
    assert score_s(0.4) == pytest.approx(10 * (5.0 + 1.0 + 7 * 0.4))
    assert score_s(0.8) == pytest.approx(10 * (100 * 0.1 + 1.0 + 7 * 0.8))


def test_more_workers_are_never_slower_and_more_photographs_never_faster() -> None:
    workers = [predict(COSTS, LARGE, Cluster(number)).seconds for number in (1, 2, 7, 50, 600, 4000, 20_000)]
    images = [predict(COSTS, Load(num), Cluster(15)).seconds for num in (1, 256, 257, 10_000, 1_000_000, 90_000_000)]

    assert workers == sorted(workers, reverse=True)
    assert images == sorted(images)


@pytest.mark.parametrize(
    ("change", "bottleneck"),
    [
        ({"start_s": 1e6}, "start"),
        ({"plan_key_s": 1.0}, "planning"),
        ({"worker_start_s": 1e6}, "start of workers"),
        ({"part_s": 1e6}, "workers"),
        ({"driver_part_s": 1e3}, "driver"),
        ({"part_requests": Requests(get=10_000_000)}, "S3 reads"),
        ({"part_requests": Requests(put=10_000_000)}, "S3 writes"),
        ({"part_requests": Requests(delete=10_000_000)}, "S3 writes"),
        ({"finish_s": 1e6}, "publishing"),
    ],
)
def test_the_longest_step_is_the_bottleneck(change: dict[str, float], bottleneck: str) -> None:
    assert predict(replace(COSTS, **change), LARGE, Cluster(4000)).bottleneck == bottleneck


def test_one_prefix_is_read_at_its_rate() -> None:
    fast = replace(COSTS, driver_part_s=0.0)

    one, many = (predict(fast, LARGE, Cluster(4000, prefixes=number)) for number in (1, 20))

    assert (one.steps_s["S3 reads"], one.gets_per_s) == pytest.approx((1e6 / 5500, 5500))
    # 3,907 parts with three writes each
    assert one.puts_per_s == pytest.approx(3907 * 3 / 1e6 * 5500)
    assert "S3 reads" not in many.steps_s


def test_a_prefix_is_listed_page_by_page() -> None:
    inventory, prefix = (predict(COSTS, LARGE, Cluster(1, pages_per_s=rate)) for rate in (float("inf"), 10.0))

    assert prefix.steps_s["planning"] - inventory.steps_s["planning"] == pytest.approx(1000 / 10)
    assert prefix.usd - inventory.usd == pytest.approx(1000 * 0.005 / 1000)


def test_requests_by_hand() -> None:
    # Photographs, workers, file: 1000 + 10 x 4 + 10 x 5 GET; 10 x 2 + 4 PUT, 10 LIST, 3 COPY.
    assert predict(COSTS, SMALL, Cluster(1)).usd == pytest.approx((1090 * 0.0004 + 37 * 0.005) / 1000)


def test_near_duplicates_are_looked_for_up_to_a_number_of_faces() -> None:
    few, many = (predict(replace(COSTS, faces_per_image=faces), LARGE, Cluster(1)) for faces in (1.0, 21.0))

    assert few.steps_s["publishing"] - many.steps_s["publishing"] == pytest.approx(26.0, rel=0.01)
    most = predict(replace(COSTS, faces_per_image=20.0), LARGE, Cluster(1))
    assert most.driver_mib == pytest.approx(500 + 100 * 20e6 / 2**20)
    assert many.driver_mib == pytest.approx(500 + 1024)


def test_costs_follow_from_the_marks_of_a_run() -> None:
    # A worker begins after 7 s and takes 3 s for each of five parts, 2.5 s of them for ten photographs. A part arrives
    # when the next one has ended, and the last two together. Two cores are busy at first, then 1.5.
    score, parts = ("score", 100.0, 50.0), [107.0 + 3.0 * number for number in (2, 3, 4, 5, 5)]
    marks = [score, *(("part", at, 76.0 + 1.5 * (at - parts[0])) for at in parts)]
    marks += [("stage", 122.5, 90.0), ("staged", 127.5, 95.0)]
    worker_s = {"detect": 7.5, "predict": 5.0, "write": 0.5}
    record = {"num_images": 50, "num_faces": 100, "timings": {"worker_s": worker_s}}

    costs = costs_of_run(marks, record, began=90.0, ended=130.0, publish_row_s=0.01)

    assert costs.pop("stages_s") == pytest.approx({"detect": 0.15, "predict": 0.1})
    assert costs == pytest.approx(
        {
            "start_s": 10.0,
            "worker_start_s": 7.0,
            "worker_start_cores": 2.0,
            "part_s": 0.5,
            "scoring_cores": 1.5,
            "publish_start_s": 5.0 - 0.5,
            "finish_s": 2.5,
            "faces_per_image": 2.0,
        }
    )


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.19, True), (0.84, True), (1.3, False), (0.8, False)])
def test_the_check_fails_above_twenty_percent(factor: float, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [1, 4]
    wanted = [predict(COSTS, SMALL, Cluster(number, 2)).seconds for number in nodes]
    monkeypatch.setattr(scale_model.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(Costs, "read", lambda _: COSTS)
    measured = iter([wanted[0], wanted[1] * factor])
    monkeypatch.setitem(sys.modules, "scale_runs", SimpleNamespace(walls_s=lambda *_: measured))
    arguments = argparse.Namespace(
        costs=Path(), checkpoint=Path(), photographs=Path(), num=1000, rows_per_part=100, nodes=nodes
    )

    if passes:
        scale_model.check_predictions(arguments)
    else:
        with pytest.raises(SystemExit, match="more than 20%"):
            scale_model.check_predictions(arguments)
