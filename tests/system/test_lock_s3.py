"""The run lock on a real S3 server (SeaweedFS)."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from agr_ray.errors import ConfigError
from agr_ray.storage import Connection, Storage
from agr_ray.storage.lock import LockLost, LockRecord, run_lock

pytestmark = pytest.mark.timeout(120)

NUM_RUNS = 8
EXPIRY_S = 12.0


@pytest.fixture
def storage(s3_environment: object) -> Storage:
    return Storage(Connection(timeout_s=5, max_attempts=3))


def stale_lock(token: str) -> bytes:
    return LockRecord.model_validate(
        {
            "token": token,
            "owner": "a run that died",
            "host": "elsewhere",
            "pid": 7,
            "acquired_at": "2026-11-24T00:00:00Z",
            "heartbeat_at": "2026-11-24T00:00:00Z",
            "expires_after_s": 1.0,
        }
    ).to_bytes()


def race(storage: Storage, uri: str, console: Console) -> list[int]:
    """Let eight runs try for the lock at once, each that gets it holding it till all have tried; return who did."""
    start, tried = threading.Barrier(NUM_RUNS), threading.Barrier(NUM_RUNS)

    def run(number: int) -> bool:
        start.wait()
        try:
            with run_lock(storage, uri, f"run {number}", expiry_s=EXPIRY_S, console=console) as lock:
                tried.wait()
                lock.check()
                return True
        except ConfigError:
            tried.wait()
            return False

    with ThreadPoolExecutor(NUM_RUNS) as pool:
        return [number for number, held in enumerate(pool.map(run, range(NUM_RUNS))) if held]


def test_one_of_eight_racing_runs_gets_the_lock(storage: Storage, s3_root: str) -> None:
    for number in range(2):
        uri = f"{s3_root}/out-work/{number}/lock.json"

        assert len(race(storage, uri, Console(file=io.StringIO()))) == 1
        assert not storage.exists(uri)


def test_one_of_eight_racing_runs_takes_over_a_stale_lock(storage: Storage, s3_root: str) -> None:
    uri, console = f"{s3_root}/out-work/lock.json", Console(file=io.StringIO())
    storage.write(uri, stale_lock("0"))

    assert len(race(storage, uri, console)) == 1
    assert console.file.getvalue().count("taken over from a run that died") == 1
    assert not storage.exists(uri)


def test_a_lock_is_renewed_and_its_loss_noticed(storage: Storage, s3_root: str) -> None:
    uri = f"{s3_root}/out-work/lock.json"
    with run_lock(storage, uri, "run 5", expiry_s=1.0, console=Console(file=io.StringIO())) as lock:
        etag = storage.read_with_etag(uri)[1]
        while storage.read_with_etag(uri)[1] == etag:
            time.sleep(0.05)
        lock.check()
        other = storage.write(uri, stale_lock("1"))
        while not lock.lost:
            time.sleep(0.05)
        with pytest.raises(LockLost):
            lock.check()

    assert storage.read_with_etag(uri)[1] == other
