"""Jobs killed with SIGKILL in the middle: the same command again finishes the work and does none of it twice."""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ROOT, Cluster, job_command, kill_command, succeed

from agr_ray.data.rendered import render_photograph
from agr_ray.labels import GENDERS, UTKFACE
from agr_ray.learn.run import CHECKPOINTS
from agr_ray.runtime.ray_compat import SNAPSHOT
from agr_ray.vision.decode import encode_jpeg

sys.path.append(str(ROOT / "tests" / "ray"))
from sets import checkpoint, prepared_set

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_PHOTOGRAPHS = 64
EPOCHS = 8
EPOCHS_BEFORE_KILL = 2
PARTS_BEFORE_KILL = 2
ROWS_PER_PART = 4


@dataclass(frozen=True)
class Killed:
    """A job that was killed and run again."""

    out: Path
    before: dict[str, tuple[int, bytes]]
    """Modification time and content of each part that the killed run left, by name."""
    printed: str
    """By the second run."""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of labelled photographs of one face that cost a moment each, no two of the same content."""
    folder = tmp_path_factory.mktemp("photographs")
    body = encode_jpeg(render_photograph(0, 0, 960, 640, 1).image_rgb)
    draw = random.Random(0)
    lines = ["key,age,gender,race"]
    for number in range(NUM_PHOTOGRAPHS):
        (folder / f"{number:03d}.jpg").write_bytes(body + number.to_bytes(2))  # what follows the end is not decoded
        lines.append(f"{number:03d}.jpg,{draw.randint(5, 90)},{draw.choice(GENDERS)},{draw.choice(UTKFACE.races)}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(photographs: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("prepare")
    work = folder / "set" / "work"
    command = job_command(
        "prepare",
        *("--source.uri", photographs, "--prepare.out", folder / "set", "--prepare.crop_side_px", 32),
        *("--cluster.address", cluster.address),
        *("--prepare.num_workers", 2, "--prepare.rows_per_file", ROWS_PER_PART, "--prepare.batch_size", 4),
        *("--split.val", 0.2, "--split.test", 0.2),
    )
    kill_command(command, cluster, folder / "log", when=lambda: len(parts(work)) >= PARTS_BEFORE_KILL)
    return Killed(folder / "set", parts(work), succeed(command, cluster.environment))


@pytest.fixture(scope="module")
def trained(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("train")
    data = prepared_set(folder / "data", {"train": 40, "val": 12})
    history = folder / "run" / "history.parquet"
    snapshot = folder / "run" / CHECKPOINTS / SNAPSHOT
    command = job_command(
        "train",
        *("--train.data", data, "--train.out", folder, "--train.name", "run"),
        *("--cluster.address", cluster.address, "--model.preset", "lightweight", "--model.image_size", 32),
        *("--train.num_workers", 2, "--train.batch_size", 16, "--train.threads_per_worker", 1),
        *("--train.epochs", EPOCHS, "--train.early_stopping_patience", 0),
    )

    def has_come_so_far() -> bool:
        """Return whether Ray has noted a checkpoint, which it does seconds later. It resumes only from those."""
        noted = snapshot.exists() and "checkpoint_dir_name" in snapshot.read_text()
        return noted and history.exists() and pq.read_metadata(history).num_rows >= EPOCHS_BEFORE_KILL

    kill_command(command, cluster, folder / "log", when=has_come_so_far)
    assert pq.read_metadata(history).num_rows < EPOCHS
    printed = succeed(command, cluster.environment)
    return Killed(folder / "run", {}, printed)


@pytest.fixture(scope="module")
def scored(photographs: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("score")
    command = job_command(
        "score",
        *(
            "--score.checkpoint",
            checkpoint(folder / "model"),
            "--score.input",
            photographs,
            "--score.out",
            folder / "out",
        ),
        *("--score.out", folder / "out", "--cluster.address", cluster.address),
        *("--score.num_workers", 2, "--score.rows_per_file", ROWS_PER_PART, "--score.batch_size", 4),
        *("--score.lock_expiry_s", 8, "--vision.detector", "haar"),
    )
    work = folder / "out-work"
    kill_command(command, cluster, folder / "log", when=lambda: len(parts(work)) >= PARTS_BEFORE_KILL)
    return Killed(folder / "out", parts(work), succeed(command, cluster.environment))


def parts(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return modification time and content of each finished part below a folder."""
    # Not by `glob`, which raises if a temporary folder goes away meanwhile.
    files = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    finished = [path for path in files if path.name.startswith("part-") and path.suffix == ".parquet"]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished}


def rows_before(killed: Killed) -> list[dict[str, Any]]:
    return [row for _, body in killed.before.values() for row in pq.read_table(pa.BufferReader(body)).to_pylist()]


def test_a_resumed_prepare_does_only_the_remaining_work(prepared: Killed) -> None:
    done = len(rows_before(prepared))

    assert 0 < done < NUM_PHOTOGRAPHS
    assert f"{done} done before, {NUM_PHOTOGRAPHS - done} to do" in prepared.printed


def test_a_resumed_prepare_has_each_image_once(prepared: Killed) -> None:
    rows = pq.read_table(prepared.out / "crops")

    assert sorted(rows["key"].to_pylist()) == [f"{number:03d}.jpg" for number in range(NUM_PHOTOGRAPHS)]
    record = json.loads((prepared.out / "prepare.json").read_text())
    assert (record["finished"], record["counts"]) == (True, {"ok": NUM_PHOTOGRAPHS})


def test_a_killed_training_resumes_after_its_last_epoch(trained: Killed) -> None:
    (line,) = [line for line in trained.printed.splitlines() if "resuming after epoch" in line]

    # An epoch whose checkpoint Ray had not noted yet when it was killed is trained again.
    assert int(line.partition("after epoch ")[2].partition(",")[0]) >= 1


def test_a_resumed_training_has_each_epoch_once(trained: Killed) -> None:
    history = pq.read_table(trained.out / "history.parquet")
    steps = history["step"].to_pylist()

    assert history["epoch"].to_pylist() == list(range(1, EPOCHS + 1))
    assert steps == [steps[0] * epoch for epoch in range(1, EPOCHS + 1)]
    assert json.loads((trained.out / "run.json").read_text())["finished"]
    assert json.loads((trained.out / "last" / "meta.json").read_text())["metrics"]["epoch"] == EPOCHS


def test_a_resumed_scoring_run_does_only_the_remaining_work(scored: Killed) -> None:
    num_parts = NUM_PHOTOGRAPHS // ROWS_PER_PART

    assert 0 < len(scored.before) < num_parts
    assert f" {NUM_PHOTOGRAPHS} to do\n" in scored.printed
    assert f"resuming: {len(scored.before)} of {num_parts} parts are done\n" in scored.printed
    scored_at = {row["uri"]: row["scored_at"] for row in pq.read_table(scored.out / "images").to_pylist()}
    assert all(scored_at[row["uri"]] == row["scored_at"] for row in rows_before(scored))


def test_a_resumed_scoring_run_has_each_photograph_once(scored: Killed) -> None:
    (success,) = (scored.out / "_SUCCESS").iterdir()
    rows = pq.read_table(scored.out / "images")

    names = sorted(Path(uri).name for uri in rows["uri"].to_pylist())
    assert names == [f"{number:03d}.jpg" for number in range(NUM_PHOTOGRAPHS)]
    assert json.loads(success.read_text())["counts"] == {"ok": NUM_PHOTOGRAPHS}
    assert not any(path.is_file() for path in Path(f"{scored.out}-work").rglob("*"))
