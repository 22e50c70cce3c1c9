"""Local files: atomic and conditional writes, and temporary files of killed writers."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agr_ray.storage import (
    ChangedObject,
    MissingObject,
    Storage,
    StorageUnavailable,
)
from agr_ray.storage.temporary import temporary_folder_beside


@pytest.fixture
def storage() -> Storage:
    return Storage()


def test_writing_replaces_and_leaves_nothing_beside(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"

    storage.write(str(path), b"one")
    storage.write(str(path), b"two")

    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["a.bin"]


def test_writing_below_a_file_gives_one_line(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")

    with pytest.raises(StorageUnavailable, match="can't be written"):
        storage.write(str(tmp_path / "file" / "a"), b"x")


@pytest.mark.parametrize("existing", [False, True])
def test_only_one_of_concurrent_conditional_writers_succeeds(storage: Storage, tmp_path: Path, existing: bool) -> None:
    path, outcomes, start = str(tmp_path / "lock"), [], threading.Barrier(8)
    etag = storage.write(path, b"an older and longer one") if existing else None

    def write(number: int) -> None:
        start.wait()
        try:
            storage.write(path, str(number).encode(), if_absent=not existing, if_match=etag)
            outcomes.append(number)
        except (FileExistsError, ChangedObject):
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [str(number) for number in outcomes] == [Path(path).read_text()]
    assert os.listdir(tmp_path) == ["lock"]


RACE = """
import sys, threading
from pathlib import Path
from refused_calls import refuse
from agr_ray.storage import Storage

refuse(sys.argv[2:])
path, winners, start = sys.argv[1], [], threading.Barrier(8)

def write(number):
    start.wait()
    try:
        Storage().write(path, str(number).encode(), if_absent=True)
        winners.append(str(number))
    except FileExistsError:
        pass

threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert winners == [Path(path).read_text()], winners
"""


def run_python(code: str, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("refused", [["link"], ["link", "renameat2"]], ids=["no links", "no conditional renames"])
def test_only_one_of_many_writers_succeeds_without_hard_links(tmp_path: Path, refused: list[str]) -> None:
    run_python(RACE, str(tmp_path / "lock"), *refused)

    assert os.listdir(tmp_path) == ["lock"]


def test_an_empty_folder_that_is_deleted_all_the_time_can_be_written_to(storage: Storage, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    code = (
        "import sys, time; from agr_ray.storage import Storage\n"
        "while True: Storage().delete_if_empty(sys.argv[1]); time.sleep(1e-4)"
    )

    with subprocess.Popen([sys.executable, "-c", code, str(folder)]) as deleter:
        try:
            for number in range(500):
                storage.write(str(folder / "lock.json"), b"%d" % number, if_absent=True)
                storage.move(str(folder / "lock.json"), str(elsewhere / "lock.json"))
                storage.move(str(elsewhere / "lock.json"), str(folder / "lock.json"))
                storage.delete(str(folder / "lock.json"))
                with temporary_folder_beside(str(folder / "tree")):
                    pass
                (tmp_path / "tree").mkdir()
                storage.move_tree(str(tmp_path / "tree"), str(folder / "tree"))
                (folder / "tree").rmdir()
        finally:
            deleter.kill()


def test_a_conflict_counts_even_if_the_name_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*_: object) -> None:
        raise FileExistsError(errno.EEXIST, "File exists")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", taken)
        with pytest.raises(FileExistsError, match="exists and is not overwritten"):
            Storage().write(str(tmp_path / "lock.json"), b"x", if_absent=True)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageUnavailable):
        Storage().write(str(tmp_path / "file" / "lock.json"), b"x", if_absent=True)
    Storage().write(str(tmp_path / "lock.json"), b"x", if_absent=True)


def test_a_file_is_replaced_or_deleted_only_if_unchanged_since_it_was_read(storage: Storage, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    first = storage.write(path, b"first")
    assert storage.read_with_etag(path) == (b"first", first)
    second = storage.write(path, b"the second", if_match=first)

    with pytest.raises(ChangedObject):
        storage.write(path, b"third", if_match=first)
    with pytest.raises(ChangedObject):
        storage.delete(path, if_match=first)
    assert storage.read_with_etag(path) == (b"the second", second)
    storage.delete(path, if_match=second)
    with pytest.raises(MissingObject):
        storage.write(path, b"third", if_match=second)
    assert os.listdir(tmp_path) == []


def test_a_waiting_writer_does_not_replace_a_file_that_was_replaced_meanwhile(storage: Storage, tmp_path: Path) -> None:
    path, outcomes = tmp_path / "a", []
    etag = storage.write(str(path), b"first")

    def write() -> None:
        with pytest.raises(ChangedObject):
            storage.write(str(path), b"third", if_match=etag)
        outcomes.append("refused")

    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a writer does that is about to replace it
        thread = threading.Thread(target=write)
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive()
        storage.write(str(path), b"the second")
    thread.join()

    assert (outcomes, path.read_bytes()) == (["refused"], b"the second")


def test_waiting_for_a_file_that_a_stopped_writer_has_locked_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agr_ray.storage.atomic._MAX_FLOCK_S", 0.2)
    uri = str(tmp_path / "lock.json")
    etag = Storage().write(uri, b"one")
    ready, told = os.pipe()
    process = os.fork()
    if not process:
        with open(uri, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.write(told, b"x")
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
    os.read(ready, 1)
    try:
        with pytest.raises(StorageUnavailable, match=r"another process has locked it for 0\.2 s; is it stopped\?"):
            Storage().write(uri, b"two", if_match=etag)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    Storage().write(uri, b"two", if_match=etag)


WRITER = """
import os, signal, sys
from pathlib import Path
from agr_ray.storage import atomic
from agr_ray.storage.temporary import temporary_folder_beside

def stop(path):
    print("writing", flush=True)
    sys.stdin.read()  # alive until it is killed

if sys.argv[2] == "file":
    atomic.write_whole(sys.argv[1], stop)
else:
    with temporary_folder_beside(sys.argv[1]) as temporary:
        Path(temporary, "weights").write_bytes(b"x")
        stop(temporary)
"""


@pytest.mark.parametrize("kind", ["file", "tree"])
def test_leftovers_of_a_killed_writer_are_deleted_but_not_those_of_a_live_one(
    storage: Storage, tmp_path: Path, kind: str
) -> None:
    def start() -> tuple[subprocess.Popen[bytes], str]:
        before = set(os.listdir(tmp_path))
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "target"), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"writing\n"
        (name,) = set(os.listdir(tmp_path)) - before
        return process, name

    live, live_name = start()
    dead, dead_name = start()
    try:
        dead.kill()
        dead.wait()
        (tmp_path / ".tmp-empty").mkdir()
        assert sorted(os.listdir(tmp_path)) == sorted([live_name, dead_name, ".tmp-empty"])

        storage.write(str(tmp_path / "other"), b"x")

        assert sorted(os.listdir(tmp_path)) == sorted([live_name, "other"])
    finally:
        live.kill()
        live.wait()


FULL_DISK = """
import resource, sys
import numpy as np
import pyarrow as pa
from agr_ray.storage import Storage, StorageUnavailable

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
table = pa.table({"a": np.random.rand(100_000)})
for write, content in ((Storage().write_table, (table, sys.argv[1])), (Storage().write, (sys.argv[1], bytes(100_000)))):
    try:
        write(*content)
    except StorageUnavailable as error:
        assert str(error) == f"{sys.argv[1]} can't be written: File too large", error
    else:
        sys.exit("nothing was raised")
"""


def test_a_file_that_does_not_fit_gives_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    run_python(FULL_DISK, str(tmp_path / "t.parquet"))

    assert os.listdir(tmp_path) == []
