"""The run lock on a local folder."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from agr_ray.errors import ConfigError
from agr_ray.storage import Storage
from agr_ray.storage.lock import LockLost, LockRecord, RunLock, clock_s, run_lock

ALIVE_S = 2.0
"""Expiry where a heartbeat must come in time, on a busy machine too."""
DEAD_S = 0.2
"""Expiry where nobody renews the lock."""

HOLDER = """
import sys
from rich.console import Console
from agr_ray.errors import ConfigError
from agr_ray.storage.lock import run_lock
from agr_ray.storage import Storage
from refused_calls import refuse
refuse(sys.argv[3:])
try:
    with run_lock(Storage(), sys.argv[1], "the other run", expiry_s=float(sys.argv[2]), console=Console()):
        print("held", flush=True)
        sys.stdin.read()
except ConfigError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def storage() -> Storage:
    return Storage()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "work" / "lock.json")


def start_holder(uri: str, expiry_s: float, refused: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start a process that holds the lock until its stdin is closed; the system refuses it these calls."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLDER, uri, str(expiry_s), *refused]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def record(expiry_s: float, heartbeat_at: str = "2026-11-24T00:00:00Z") -> LockRecord:
    return LockRecord.model_validate(
        {
            "token": "0" * 32,
            "owner": "run 6",
            "host": "elsewhere",
            "pid": 7,
            "acquired_at": heartbeat_at,
            "heartbeat_at": heartbeat_at,
            "expires_after_s": expiry_s,
        }
    )


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lock_is_held_renewed_and_released(storage: Storage, uri: str) -> None:
    with run_lock(storage, uri, "run 5", expiry_s=0.4, console=Console()) as lock:
        held = LockRecord.model_validate_json(storage.read(uri))
        wait_until(lambda: LockRecord.model_validate_json(storage.read(uri)).heartbeat_at > held.heartbeat_at)
        lock.check()

    assert held.owner == "run 5"
    assert not storage.exists(uri)


def test_a_lock_is_released_after_an_error(storage: Storage, uri: str) -> None:
    with pytest.raises(ZeroDivisionError), run_lock(storage, uri, "run 5", expiry_s=ALIVE_S, console=Console()):
        _ = 1 / 0

    assert not storage.exists(uri)


def test_a_run_is_rejected_with_the_name_of_the_living_locks_owner(storage: Storage, uri: str) -> None:
    with run_lock(storage, uri, "run 5", expiry_s=ALIVE_S, console=Console()) as lock:
        with (
            pytest.raises(ConfigError, match=r"held by run 5 \(process .*since .*heartbeat .*wait until it ends"),
            run_lock(storage, uri, "run 6", expiry_s=ALIVE_S, console=Console()),
        ):
            pass
        lock.check()
        assert storage.exists(uri)


@pytest.mark.slow
def test_one_of_two_racing_processes_gets_the_lock(storage: Storage, uri: str) -> None:
    racers = [start_holder(uri, ALIVE_S) for _ in range(2)]
    wait_until(lambda: any(racer.poll() is not None for racer in racers))
    loser, winner = sorted(racers, key=lambda racer: racer.poll() is None)
    # What is read to its end has ended: the winner only once its stdin is closed.
    lost_output, lost_errors = loser.communicate()
    won_output, _ = winner.communicate()

    assert (loser.returncode, winner.returncode) == (1, 0)
    assert "that run is alive" in lost_errors
    assert "held" not in lost_output.split("\n")
    assert won_output == "held\n"
    assert not storage.exists(uri)


@pytest.mark.parametrize("heartbeat_at", ["1970-01-01T00:00:00Z", "2100-01-01T00:00:00Z"])
def test_a_lock_without_a_heartbeat_is_taken_over_with_a_warning_whatever_its_clock(
    storage: Storage, uri: str, heartbeat_at: str
) -> None:
    storage.write(uri, record(DEAD_S, heartbeat_at).model_dump_json().encode())
    console = Console(file=io.StringIO())

    with run_lock(storage, uri, "run 7", expiry_s=ALIVE_S, console=console):
        assert LockRecord.model_validate_json(storage.read(uri)).owner == "run 7"

    assert "warning: " in console.file.getvalue()
    assert "taken over from run 6 (process 7 on elsewhere)" in console.file.getvalue()


def test_the_lock_of_a_killed_process_of_this_machine_is_taken_over_at_once(storage: Storage, uri: str) -> None:
    holder = start_holder(uri, 3600.0)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    console = Console(file=io.StringIO())

    with run_lock(storage, uri, "run 7", expiry_s=ALIVE_S, console=console) as lock:
        lock.check()

    assert "taken over from the other run" in console.file.getvalue()
    assert "that process is gone" in console.file.getvalue()


def test_a_lock_that_disappears_while_watched_is_free(storage: Storage, uri: str) -> None:
    storage.write(uri, record(5 * ALIVE_S).to_bytes())
    console = Console(file=io.StringIO())

    def release() -> None:
        wait_until(lambda: "watching it" in console.file.getvalue())
        storage.delete(uri)

    other = threading.Thread(target=release)
    other.start()
    with run_lock(storage, uri, "run 7", expiry_s=ALIVE_S, console=console) as lock:
        lock.check()
    other.join()

    assert "taken over" not in console.file.getvalue()


@pytest.mark.parametrize("by", ["deletion", "take-over"])
def test_a_lost_lock_is_noticed_and_not_released(storage: Storage, uri: str, by: str) -> None:
    with run_lock(storage, uri, "run 5", expiry_s=0.4, console=Console()) as lock:
        if by == "deletion":
            storage.delete(uri)
        else:
            storage.write(uri, record(DEAD_S).to_bytes())
        wait_until(lambda: lock.lost)

        with pytest.raises(LockLost, match="no longer ours"):
            lock.check()

    assert storage.exists(uri) == (by == "take-over")


def test_a_run_that_slept_through_its_expiry_checks_its_lock(storage: Storage, uri: str) -> None:
    etag = storage.write(uri, record(ALIVE_S).to_bytes())
    slept = clock_s() - ALIVE_S
    still_ours = RunLock(storage, uri, record(ALIVE_S), etag, confirmed_s=slept)

    still_ours.check()
    assert storage.read_with_etag(uri)[1] != etag

    taken_over = RunLock(storage, uri, record(ALIVE_S), etag, confirmed_s=slept)
    storage.write(uri, b'{"token": "of another run"}')
    with pytest.raises(LockLost):
        taken_over.check()


def test_a_run_whose_machine_slept_checks_its_lock(storage: Storage, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the machine's own clocks, only the one that counts sleep continues.
    slept_s = 0.0
    clock_gettime = time.clock_gettime
    monkeypatch.setattr(
        time, "clock_gettime", lambda clock: clock_gettime(clock) + (slept_s if clock == time.CLOCK_BOOTTIME else 0.0)
    )
    with run_lock(storage, uri, "run 5", expiry_s=600.0, console=Console()) as lock:
        etag = storage.write(uri, record(DEAD_S).to_bytes())  # another run's, while we slept
        lock.check()
        slept_s = 601.0
        with pytest.raises(LockLost):
            lock.check()

    assert storage.read_with_etag(uri)[1] == etag


@pytest.mark.parametrize("refused", [["link"], ["link", "renameat2"]], ids=["no links", "no conditional renames"])
def test_a_lock_works_without_hard_links(storage: Storage, uri: str, refused: list[str]) -> None:
    holders = [start_holder(uri, ALIVE_S, refused) for _ in range(3)]
    outcomes = []
    for holder in holders:
        holder.stdout.readline()
    wait_until(lambda: sum(holder.poll() is not None for holder in holders) == 2)
    held = LockRecord.model_validate_json(storage.read(uri))
    for holder in holders:
        outcomes.append((holder.wait(30) if holder.poll() is not None else None, holder.pid))
    (owner,) = [pid for code, pid in outcomes if code is None]
    assert held.pid == owner
    for holder in holders:
        if holder.pid == owner:
            holder.communicate("", timeout=30)

    assert [code for code, _ in outcomes if code is not None] == [1, 1]
    assert os.listdir(Path(uri).parent) == []


def test_an_empty_lock_of_a_run_that_died_while_creating_it_is_taken_over(
    storage: Storage, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agr_ray.storage.lock._EMPTY_EXPIRES_S", DEAD_S)
    storage.write(uri, b"")
    console = Console(file=io.StringIO())

    with run_lock(storage, uri, "run 5", expiry_s=ALIVE_S, console=console) as lock:
        lock.check()

    assert "taken over from a run that is just starting, or died while starting" in console.file.getvalue()


def test_a_lock_outlives_an_outage_of_storage(storage: Storage, uri: str) -> None:
    folder = Path(uri).parent
    console = Console(file=io.StringIO())
    with run_lock(storage, uri, "run 5", expiry_s=1.0, console=console) as lock:
        folder.rename(folder.with_name("away"))
        folder.write_bytes(b"a file, in which no lock can be written")
        wait_until(lambda: "no heartbeat" in console.file.getvalue())
        folder.unlink()
        folder.with_name("away").rename(folder)
        etag = storage.read_with_etag(uri)[1]
        wait_until(lambda: storage.read_with_etag(uri)[1] != etag)

        lock.check()

    assert console.file.getvalue().count("warning: no heartbeat") == 1


def test_our_own_heartbeat_is_recognised_after_a_lost_response(storage: Storage, uri: str) -> None:
    before = storage.write(uri, record(ALIVE_S).to_bytes())
    storage.write(uri, record(ALIVE_S).to_bytes() + b"\n")
    lock = RunLock(storage, uri, record(ALIVE_S), before, confirmed_s=0.0)

    lock.renew(storage)
    lock.check()
    storage.write(uri, record(ALIVE_S).to_bytes() + b"\n")
    lock.release()

    assert not storage.exists(uri)


def test_our_own_new_lock_is_recognised_after_a_lost_response(uri: str) -> None:
    class LosesAnswers(Storage):
        def write(self, uri, data, *, if_absent=False, if_match=None):
            etag = super().write(uri, data, if_absent=if_absent, if_match=if_match)
            if if_absent:  # the client retried, and the conflict is with its own first attempt
                raise FileExistsError
            return etag

    storage, console = LosesAnswers(), Console(file=io.StringIO())
    with run_lock(storage, uri, "run 5", expiry_s=ALIVE_S, console=console) as lock:
        lock.check()

    assert console.file.getvalue() == ""
    assert not storage.exists(uri)


def test_a_file_that_is_not_a_lock_is_not_changed(storage: Storage, uri: str) -> None:
    storage.write(uri, b"{}")

    with (
        pytest.raises(ConfigError, match="not a run lock"),
        run_lock(storage, uri, "run 5", expiry_s=ALIVE_S, console=Console()),
    ):
        pass

    assert storage.read(uri) == b"{}"
