"""`agr-ray status` says what is published, running and stuck, from the files that jobs leave."""

from __future__ import annotations

import datetime
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import sweeps
from cropping_here import CroppingHere
from prepared_sets import prepared_set
from test_score_driver import NAMES, Bucket, bucket
from this_process import ThisProcess, model, workers

from agr_ray.cli import main
from agr_ray.config import PrepareConfig, PrepareJob, SourceConfig, SplitConfig, VisionConfig
from agr_ray.console import make_console
from agr_ray.data.preparation import prepare_set
from agr_ray.data.rendered import render_chip
from agr_ray.errors import JobError
from agr_ray.report import status_folders
from agr_ray.report.status_folders import Status, read_status
from agr_ray.schema import HISTORY
from agr_ray.scoring.driver import score_input
from agr_ray.scoring.scorer import Scoring
from agr_ray.storage import Storage
from agr_ray.storage.lock import LockRecord, lock_holder, run_lock
from agr_ray.storage.parts import Parts
from agr_ray.vision.decode import encode_jpeg

__all__ = ["bucket", "model", "workers"]  # fixtures
STORAGE = Storage()


def read(folder: Path) -> Status:
    status = read_status(STORAGE, str(folder))
    assert status is not None
    return status


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int | str | None, str, str]:
    code: int | str | None = 0
    try:
        main(["status", *argv])
    except SystemExit as end:
        code = end.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


class Stops(ThisProcess):
    """Workers that stop after one part."""

    def score(self, scoring: Scoring, parts: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        yield from super().score(scoring, parts[:1])
        scoring.parts.begin(parts[1])
        raise JobError("stopped")


def stop(bucket: Bucket, **changes: Any) -> str:
    """Score one part of three, and return the configuration's identity."""
    with pytest.raises(JobError, match="stopped"):
        score_input(bucket.job(**changes), Stops(bucket._workers._predictor), make_console(io.StringIO()))
    (folder,) = (each for each in (bucket.folder / "out-work").iterdir() if each.is_dir())
    return folder.name


def write_lock(path: Path, owner: str, *, silent_s: float) -> None:
    """Write the lock of a process on another machine."""
    at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=silent_s)
    record = LockRecord(
        token="t", owner=owner, host="node-7", pid=42, acquired_at=at, heartbeat_at=at, expires_after_s=120.0
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.model_dump_json())


# Scores


def test_published_runs_are_listed_with_their_counts(bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    first = bucket.score()
    bucket.put("new.jpg", seed=1)
    (bucket.input / "bad.jpg").write_bytes(b"no image")
    second = bucket.score()

    status = read(bucket.out)

    assert (status.kind, status.running, status.unfinished, status.stuck) == ("scores", None, [], [])
    assert status.published == [
        {
            "run": record["run_id"],
            "published_at": record["published_at"],
            "images": num_images,
            "faces": record["num_faces"],
            "rejects": num_rejects,
            "model": record["model_digest"],
        }
        for record, num_images, num_rejects in ((first, len(NAMES), 0), (second, 2, 1))
    ]
    code, out, _ = outcome(capsys, str(bucket.out))
    assert code == 0
    assert "published: 2" in out.splitlines()
    assert out.splitlines()[-1] == "nothing is stuck"


def test_totals_that_score_min_cell_withholds_are_not_shown(bucket: Bucket) -> None:
    bucket.score(min_cell=3)
    bucket.put("a/new.jpg", "b/new.jpg", "c/new.jpg", "d/new.jpg", seed=1)
    stop(bucket)

    status = read(bucket.out)

    assert [(run["images"], run["faces"], run["rejects"]) for run in status.published] == [(None, None, None)]
    assert [(work.details["photographs"], work.details["photographs_done"]) for work in status.unfinished] == [
        (None, None)
    ]


def test_photographs_of_a_first_run_with_min_cell_are_not_counted(
    bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    stop(bucket, min_cell=3)

    (work,) = read(bucket.out).unfinished

    assert (work.details["photographs"], work.details["photographs_done"]) == (None, None)
    assert ", photographs " not in outcome(capsys, str(bucket.out))[1]


def test_a_job_that_begins_while_the_files_are_read_is_running(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = stop(bucket)
    lock = bucket.folder / "out-work" / "lock.json"

    def look_and_begin(storage: Storage, uri: str) -> LockRecord | None:
        holder = lock_holder(storage, uri)
        write_lock(lock, identity, silent_s=1.0)
        return holder

    monkeypatch.setattr(status_folders, "lock_holder", look_and_begin)

    status = read(bucket.out)

    assert status.stuck == []
    assert status.running is not None


def test_a_job_that_begins_and_ends_while_the_files_are_read_is_not_stuck(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(bucket)
    files_by_folder, num_calls = status_folders._files_by_folder, 0

    def list_and_publish(storage: Storage, uri: str) -> dict[str, list[str]]:
        nonlocal num_calls
        num_calls += 1
        files = files_by_folder(storage, uri)
        if num_calls == 1:
            bucket.score()
            bucket.put("new.jpg", seed=1)
        return files

    monkeypatch.setattr(status_folders, "_files_by_folder", list_and_publish)

    status = read(bucket.out)

    assert (status.stuck, status.running, status.unfinished) == ([], None, [])
    assert len(status.published) == 1


def test_unpublished_work_is_stuck_and_says_how_much_is_done(
    bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = stop(bucket)

    status = read(bucket.out)

    (work,) = status.unfinished
    assert (work.done, work.total, work.unit) == (1, 3, "parts")
    assert (work.details["photographs_done"], work.details["photographs"], work.details["parts_begun"]) == (2, 6, 1)
    assert (status.published, status.running) == ([], None)
    assert len(status.stuck) == 1
    assert identity in status.stuck[0]
    code, out, _ = outcome(capsys, str(bucket.out), "--json")
    assert code == 3
    assert json.loads(out)["unfinished"][0]["done"] == 1
    bucket.score()
    assert (read(bucket.out).stuck, len(read(bucket.out).published)) == ([], 1)


def test_a_running_job_is_not_stuck_but_work_of_another_configuration_is(bucket: Bucket) -> None:
    identity = stop(bucket)
    lock = str(bucket.folder / "out-work" / "lock.json")

    with run_lock(STORAGE, lock, identity, expiry_s=60.0, console=make_console(io.StringIO())):
        status = read(bucket.out)
    with run_lock(STORAGE, lock, "another", expiry_s=60.0, console=make_console(io.StringIO())):
        other = read(bucket.out)

    assert status.running is not None
    assert status.running["owner"] == identity
    assert (len(status.unfinished), status.stuck) == (1, [])
    assert other.running is not None
    assert [identity in sentence for sentence in other.stuck] == [True]


@pytest.mark.parametrize(("silent_s", "num_stuck"), [(60.0, 0), (600.0, 2)])
def test_a_lock_of_another_machine_expires_with_its_last_heartbeat(
    bucket: Bucket, silent_s: float, num_stuck: int
) -> None:
    identity = stop(bucket)
    write_lock(bucket.folder / "out-work" / "lock.json", identity, silent_s=silent_s)

    status = read(bucket.out)

    assert len(status.stuck) == num_stuck, status.stuck
    if num_stuck:
        assert status.running is None
        assert "its lock has expired" in status.stuck[0]
        assert "process 42 on node-7" in status.stuck[0]
    else:
        assert status.running is not None
        assert (status.running["host"], status.running["pid"]) == ("node-7", 42)


def test_a_lock_whose_process_is_gone_has_expired(bucket: Bucket) -> None:
    with run_lock(
        STORAGE, str(bucket.folder / "out-work" / "lock.json"), "x", expiry_s=60.0, console=make_console(io.StringIO())
    ) as lock:
        record = lock._record
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = record.model_copy(update={"pid": gone.pid})
    (bucket.folder / "out-work" / "lock.json").write_text(dead.model_dump_json())

    assert ["its lock has expired" in sentence for sentence in read(bucket.out).stuck] == [True]


def test_a_job_that_was_stopped_while_it_planned_or_published_is_stuck(bucket: Bucket) -> None:
    bucket.score()
    assert read(bucket.out).stuck == []
    left = bucket.out / "images" / "run=20260101T000000.000Z-0123abcd"
    left.mkdir()
    (left / "images-00000.parquet").write_text("half")
    manifest = bucket.folder / "out-work" / "0123456789ab" / "PLAN" / "manifest"
    manifest.mkdir(parents=True)
    (manifest / "parts-000000.parquet").write_text("half")

    planned, published = read(bucket.out).stuck

    assert "0123456789ab: a job was stopped while it planned" in planned
    assert "(20260101T000000.000Z-0123abcd)" in published


def test_rejected_work_says_why(bucket: Bucket) -> None:
    for name in NAMES:
        (bucket.input / name).write_bytes(b"no image")
    with pytest.raises(Exception, match="--max-refused"):
        bucket.score()

    assert any("score.max_refused 0.5" in sentence for sentence in read(bucket.out).stuck)


# Training


def training_run(folder: Path, *, finished: str = "", epochs: int = 2) -> Path:
    folder.mkdir()
    record = {"finished": finished, "config": {"train": {"epochs": 5, "out": "secret=hunter2hunter2"}}}
    (folder / "run.json").write_text(json.dumps(record))
    rows = [sweeps.row(epoch, 1.0 / epoch, train_loss=3.0 - epoch) for epoch in range(1, epochs + 1)]
    if rows:
        STORAGE.write_table(pa.Table.from_pylist(rows, schema=HISTORY), str(folder / "history.parquet"))
    return folder


def test_a_finished_training_run_has_a_checkpoint(tmp_path: Path) -> None:
    folder = training_run(tmp_path / "run", finished="early_stopping")

    status = read(folder)

    assert (status.kind, status.unfinished, status.stuck) == ("training run", [], [])
    assert status.published == [
        {
            "checkpoint": f"{folder}/best",
            "ended_by": "early_stopping",
            "epochs": 2,
            "best_epoch": 2,
            "best_objective": 0.5,
            "last_train_loss": 1.0,
        }
    ]


def test_a_training_run_is_stuck_unless_its_lock_is_alive(tmp_path: Path) -> None:
    folder = training_run(tmp_path / "run")

    stopped = read(folder)
    write_lock(folder / "lock.json", f"training run {folder}", silent_s=1.0)
    running = read(folder)
    write_lock(folder / "lock.json", f"training run {folder}", silent_s=1000.0)
    (folder / "failure.txt").write_text("epoch 3, step 7: loss nan\nimage-1")
    failed = read(folder)

    assert [(work.done, work.total) for work in stopped.unfinished] == [(2, 5)]
    assert [sentence.startswith("training: 2 of 5 epochs done") for sentence in stopped.stuck] == [True]
    assert (running.stuck, running.running is not None) == ([], True)
    assert len(failed.stuck) == 3
    assert failed.stuck[-1].startswith("the loss was not finite: epoch 3, step 7: loss nan;")


@pytest.mark.parametrize("kind", ["training run", "comparison", "cross-validation"])
def test_a_run_that_has_only_a_lock_is_starting(tmp_path: Path, kind: str) -> None:
    write_lock(tmp_path / "run" / "lock.json", f"{kind} x", silent_s=1.0)
    assert read(tmp_path / "run").kind == kind
    assert read(tmp_path / "run").stuck == []


# Sweeps


def test_a_sweep_counts_its_trials(tmp_path: Path) -> None:
    sweep = sweeps.opened(sweeps.tune_job(tmp_path))
    sweeps.complete(sweep, [0.5, 0.4])
    sweep.next()

    status = read(tmp_path / "sweep")

    assert [str(work) for work in status.unfinished] == [
        "sweep: 1 of 3 trials done, complete 1, unfinished 1, best trial 0, best objective 0.4"
    ]
    assert len(status.stuck) == 1
    sweep.write_record("3 trials")
    assert read(tmp_path / "sweep").stuck == []
    assert read(tmp_path / "sweep").published[0]["best_trial"] == 0


# Comparisons and cross-validations


def runs_folder(folder: Path, kind: str, **states: str) -> Path:
    """Write the folder of runs; each is `complete`, `begun` or `waiting`."""
    for name, state in states.items():
        if state != "waiting":
            STORAGE.write(str(folder / "runs" / name / "run.json"), b"{}")
            STORAGE.write(str(folder / "evaluations" / name / "predictions.parquet"), b"rows")
        if state == "complete":
            STORAGE.write(str(folder / "evaluations" / name / "metrics.json"), b"{}")
    STORAGE.write(str(folder / f"{kind}.json"), json.dumps({"runs": [*states], "data": "x"}).encode())
    return folder


@pytest.mark.parametrize(("kind", "unit"), [("comparison", "runs"), ("cross-validation", "folds")])
def test_unfinished_runs_are_counted_and_stuck_unless_a_job_works_on_them(
    tmp_path: Path, kind: str, unit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs_folder(tmp_path / "out", kind, a="complete", b="begun", c="waiting", d="waiting")

    stopped = read(folder)
    code, shown, _ = outcome(capsys, str(folder), "--json")
    write_lock(folder / "lock.json", f"{kind} {folder}", silent_s=1.0)
    running = read(folder)
    write_lock(folder / "lock.json", f"{kind} {folder}", silent_s=1000.0)
    expired = read(folder)

    assert (stopped.kind, stopped.published, stopped.running) == (kind, [], None)
    assert [str(work) for work in stopped.unfinished] == [f"{kind}: 1 of 4 {unit} done, unfinished 1, failed 0"]
    assert stopped.stuck == [f"{kind}: 1 of 4 {unit} done, and nothing works on it; the same command resumes it"]
    assert (code, json.loads(shown)["unfinished"][0]["details"]) == (3, {"unfinished": 1, "failed": 0})
    assert running.running is not None
    assert (running.running["owner"], running.stuck, running.unfinished) == (
        f"{kind} {folder}",
        [],
        stopped.unfinished,
    )
    assert ["its lock has expired" in sentence for sentence in expired.stuck] == [True, False]


def test_a_comparison_that_is_reported_names_its_failed_runs(tmp_path: Path) -> None:
    folder = runs_folder(tmp_path / "out", "comparison", a="complete", b="begun", c="complete")
    failures = {"b": "loss nan, secret=hunter2hunter2", "c": "out of memory"}  # c is complete by now
    STORAGE.write(str(folder / "failures.json"), json.dumps(failures).encode())
    STORAGE.write(str(folder / "measured.json"), json.dumps({"commits": {"a": "", "c": ""}}).encode())

    status = read(folder)
    write_lock(folder / "lock.json", f"comparison {folder}", silent_s=1.0)
    retried = read(folder)

    assert status.published == [{"report": f"{folder}/report.html", "runs": 2}]
    assert [str(work) for work in status.unfinished] == ["comparison: 2 of 3 runs done, unfinished 0, failed 1"]
    assert [sentence.startswith("b failed: loss nan") for sentence in status.stuck] == [False, True]
    assert "hunter2" not in "".join(status.stuck)
    assert (retried.stuck, retried.published) == ([], status.published)


def test_runs_that_are_complete_but_not_reported_are_stuck(tmp_path: Path) -> None:
    folder = runs_folder(tmp_path / "out", "comparison", a="complete", b="complete")
    STORAGE.write(str(folder / "measured.json"), json.dumps({"commits": {"a": ""}}).encode())

    before = read(folder)
    STORAGE.write(str(folder / "measured.json"), json.dumps({"commits": {"a": "", "b": ""}}).encode())

    assert before.stuck == ["comparison: 2 of 2 runs done, and nothing works on it; the same command resumes it"]
    assert (read(folder).stuck, read(folder).unfinished) == ([], [])


def test_a_finished_cross_validation_has_predictions(tmp_path: Path) -> None:
    folder = runs_folder(tmp_path / "cv", "cross-validation", **{"fold-0": "complete", "fold-1": "complete"})
    table = pa.table({"fold": ["fold-0", "fold-1"]})
    STORAGE.write_table(table, str(folder / "folds.parquet"))
    without = read(folder)
    STORAGE.write_table(table, str(folder / "predictions.parquet"))

    status = read(folder)

    assert (len(without.stuck), without.published) == (1, [])
    assert (status.stuck, status.unfinished) == ([], [])
    assert status.published == [{"predictions": f"{folder}/predictions.parquet", "folds": 2}]


# Prepared sets


def test_a_preparation_says_how_many_images_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faces").mkdir()
    for number in range(6):
        name = f"{20 + number}_{number % 2}_0_2017010100000000{number}.jpg"
        (tmp_path / "faces" / name).write_bytes(encode_jpeg(render_chip(0, number).image_rgb))
    job = PrepareJob(
        source=SourceConfig(kind="utkface", uri=str(tmp_path / "faces")),
        split=SplitConfig(near_duplicates="count"),
        vision=VisionConfig(detector="none"),
        prepare=PrepareConfig(out=str(tmp_path / "set"), crop_side_px=32, rows_per_file=2, outage_s=0.0),
    )
    write = Parts.write

    def write_one(parts: Parts, number: int, table: pa.Table) -> None:
        if parts.finished():
            raise JobError("stopped")
        write(parts, number, table)

    monkeypatch.setattr(Parts, "write", write_one)
    with pytest.raises(JobError, match="stopped"):
        prepare_set(job, CroppingHere(job), make_console(io.StringIO()))
    monkeypatch.undo()

    monkeypatch.setattr(Storage, "read_footer", lambda *_: pytest.fail("a request for each part"))
    stopped = read(tmp_path / "set")
    monkeypatch.undo()
    prepare_set(job, CroppingHere(job), make_console(io.StringIO()))
    done = read(tmp_path / "set")

    assert [(work.done, work.total, work.unit) for work in stopped.unfinished] == [(2, 6, "images")]
    assert [work.details for work in stopped.unfinished] == [{"parts_begun": 1}]
    assert (len(stopped.stuck), stopped.published) == (1, [])
    assert (done.stuck, done.unfinished) == ([], [])
    assert done.published[0]["images"] == 6


def test_an_unfinished_set_without_work_is_stuck(tmp_path: Path) -> None:
    assert read(prepared_set(tmp_path / "done")).stuck == []
    assert len(read(prepared_set(tmp_path / "set", finished=False)).stuck) == 1


# Anything else


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "there is no such folder"), ([], "it holds nothing of score"), (["a.jpg"], "it holds nothing of score")],
)
def test_other_folders_are_rejected_with_one_line(
    tmp_path: Path, content: list[str] | None, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "x").mkdir()
    for name in content or []:
        (tmp_path / "x" / name).write_text("x")

    code, out, error = outcome(capsys, str(tmp_path / "x"))

    assert (code, out, len(error.splitlines())) == (2, "", 1)
    assert error.startswith(f"error: folder {tmp_path}/x: {problem}")
    assert error.endswith("give OUT of score, prepare, compare or cross-validate, or OUT/NAME of train or tune\n")


def test_a_damaged_record_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{")
    code, _, error = outcome(capsys, str(tmp_path))
    assert (code, len(error.splitlines())) == (2, 1)
    assert "a file is damaged" in error


def test_secrets_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = training_run(tmp_path / "run")
    write_lock(folder / "lock.json", "sweep https://user:hunter2hunter2@host/x", silent_s=1.0)
    for more in ([], ["--json"]):
        assert "hunter2" not in "".join(map(str, outcome(capsys, str(folder), *more)))


def test_neither_ray_nor_torch_is_imported(tmp_path: Path) -> None:
    folder = training_run(tmp_path / "run", finished="epochs")
    code = (
        "import sys; from agr_ray.cli import main; main(sys.argv[1:])\n"
        "print([name for name in ('ray', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "status", str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
