"""`agr-ray status` on a real S3 server (SeaweedFS): scores, beside them their work, and a training run."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pytest

from agr_ray.cli import main
from agr_ray.console import make_console
from agr_ray.report.status_folders import read_status
from agr_ray.schema import HISTORY
from agr_ray.storage import Storage
from agr_ray.storage.lock import run_lock

pytestmark = pytest.mark.timeout(120)
PLAN = {
    **dict.fromkeys(("num_listed", "num_excluded", "num_scored", "num_duplicates"), 0),
    "num_to_do": 5,
    "num_parts": 3,
    "rows_per_part": 2,
    "endings_left_out": {},
    "num_grouped": {},
}


def write(storage: Storage, uri: str, record: object) -> None:
    storage.write(uri, json.dumps(record).encode())


def test_scores_and_their_unpublished_work(s3_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    storage, out = Storage(), f"{s3_root}/scores"
    record = {"run_id": "r", "published_at": "t", "num_images": 4, "num_faces": 3, "counts": {"ok": 3, "unreadable": 1}}
    write(storage, f"{out}/_SUCCESS/run=r.json", record | {"model_digest": "m", "min_cell": 0})
    storage.write(f"{out}/images/run=r/images-00000.parquet", b"rows")
    plan = f"{out}-work/abc"
    write(storage, f"{plan}/plan.json", {"plan_id": "p", "started_at": "t", "min_cell": 0})
    write(storage, f"{plan}/p/manifest/plan.json", PLAN)
    for number in (0, 2):
        storage.write(f"{plan}/p/parts/part-{number:08d}.parquet", b"rows")

    with pytest.raises(SystemExit) as ended:
        main(["status", out, "--json"])
    with run_lock(storage, f"{out}-work/lock.json", "abc", expiry_s=60.0, console=make_console(io.StringIO())):
        running = read_status(storage, out)

    shown = json.loads(capsys.readouterr().out)
    assert ended.value.code == 3
    assert [(run["images"], run["faces"], run["rejects"]) for run in shown["published"]] == [(4, 3, 1)]
    assert shown["unfinished"][0]["details"]["photographs_done"] == 3
    assert len(shown["stuck"]) == 1
    assert running is not None
    assert (running.stuck, running.running is not None) == ([], True)


def test_a_training_run(s3_root: str) -> None:
    storage, uri = Storage(), f"{s3_root}/runs/lite"
    write(storage, f"{uri}/run.json", {"finished": "", "config": {"train": {"epochs": 5}}})
    row = dict.fromkeys(HISTORY.names, 0.5) | {"epoch": 1, "step": 1, "num_train_rows": 1, "num_val_rows": 1}
    storage.write_table(pa.Table.from_pylist([row], schema=HISTORY), f"{uri}/history.parquet")

    status = read_status(storage, uri)

    assert status is not None
    assert [(work.done, work.total) for work in status.unfinished] == [(1, 5)]
    assert len(status.stuck) == 1


def test_nothing_is_there(s3_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["status", f"{s3_root}/nothing"])

    assert ended.value.code == 2
    assert "there is no such folder" in capsys.readouterr().err
