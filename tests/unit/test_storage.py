"""Storage on the local disk, and the parsing of URIs."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from agr_ray.schema import Status
from agr_ray.storage import (
    ChangedObject,
    MissingObject,
    ObjectTooLarge,
    Storage,
    StorageFailed,
    StorageUnavailable,
)

_NOBODY = 65534
ODD_NAMES = ["a b.jpg", "ünï/日本.jpg", "p%20q%.jpg", "h#h.jpg", "e=1/f+g.jpg", "q?x&y.jpg", "back\\slash.jpg"]


@pytest.fixture
def storage() -> Storage:
    return Storage()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_listed_and_read_back(storage: Storage, tmp_path: Path, name: str) -> None:
    storage.write(storage.join(str(tmp_path), name), name.encode())

    (info,) = storage.list(str(tmp_path))

    assert info.key == name
    assert storage.read(info.uri, etag=info.etag) == name.encode()


def test_a_name_that_is_not_utf8_gets_a_uri_that_reads_it_and_fits_a_table(storage: Storage, tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9 1.jpg")
    with open(path, "wb") as file:
        file.write(b"coffee")

    (info,) = storage.list(str(tmp_path))

    assert info.key == "caf%E9%201.jpg"
    assert pa.array([info.uri])[0].as_py() == info.uri
    assert storage.read(info.uri, etag=info.etag) == b"coffee"


def test_listing_follows_the_order_of_whole_keys_as_s3_does(storage: Storage, tmp_path: Path) -> None:
    keys = ["a.jpg", "a/z.jpg", "a0.jpg", "B.jpg", "a-1.jpg", "a/b/c.jpg", "é.jpg"]
    for key in keys:
        storage.write(storage.join(str(tmp_path), key), b"x")

    assert [info.key for info in storage.list(str(tmp_path))] == sorted(keys, key=str.encode)


def test_listing_keeps_the_wanted_suffixes_in_either_case(storage: Storage, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.JPG", "c.png", "README", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()

    assert [info.key for info in storage.list(str(tmp_path), [".jpg"])] == ["a.jpg", "b.JPG"]


def test_a_link_to_a_folder_that_holds_it_is_not_followed_for_ever(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b"x")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path / "real")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")

    keys = [info.key for info in storage.list(str(tmp_path))]

    assert keys == ["other/a.jpg", "real/a.jpg"]


@pytest.mark.parametrize("name", ["none", "file"])
def test_listing_what_is_not_a_folder_is_refused(storage: Storage, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"x")

    with pytest.raises(StorageUnavailable, match=name):
        list(storage.list(str(tmp_path / name)))


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """Yield a folder as a non-root user, because permissions do not restrict root."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        if os.geteuid() == 0:
            os.chown(folder, _NOBODY, _NOBODY)
            os.seteuid(_NOBODY)
        try:
            yield Path(folder)
        finally:
            if os.getuid() == 0:
                os.seteuid(0)


@pytest.mark.parametrize("mode", [0o000, 0o400], ids=["not listed", "listed and not entered"])
def test_an_unreadable_subfolder_among_others_is_skipped_and_named(
    storage: Storage, unprivileged: Path, capsys: pytest.CaptureFixture[str], mode: int
) -> None:
    for name in ("a", "lost+found", "z/deep", "z/shut"):
        (unprivileged / name).mkdir(parents=True)
        (unprivileged / name / "1.jpg").write_bytes(b"x")
    for name in ("lost+found", "z/shut"):
        (unprivileged / name).chmod(mode)
    uri = str(unprivileged)

    keys = [info.key for info in storage.list_readable(uri, [".jpg"])]
    with pytest.raises(StorageUnavailable, match=r"lost\+found can't be listed"):
        list(storage.list(uri))
    for name in ("lost+found", "z/shut"):
        (unprivileged / name).chmod(0o700)

    assert keys == ["a/1.jpg", "z/deep/1.jpg"]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: skipping folder {uri}/lost+found: this user may not list it",
        f"warning: skipping folder {uri}/z/shut: this user may not list it",
        f"warning: 2 folders below {uri} were skipped",
    ]


@pytest.mark.parametrize("mode", [0o000, 0o400])
def test_an_unreadable_root_is_an_error(storage: Storage, unprivileged: Path, mode: int) -> None:
    root = unprivileged / "photos"
    root.mkdir()
    (root / "1.jpg").write_bytes(b"x")
    root.chmod(mode)

    with pytest.raises(StorageUnavailable, match="photos can't be listed"):
        list(storage.list_readable(str(root)))
    root.chmod(0o700)


def test_reading_a_missing_file_is_data_with_a_status(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(MissingObject, match=r"gone\.jpg") as caught:
        storage.read(str(tmp_path / "gone.jpg"))

    assert caught.value.status is Status.MISSING


def test_a_file_that_changed_since_it_was_listed_is_refused(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"old")
    (info,) = storage.list(str(tmp_path))
    os.utime(path, ns=(1, 1))

    with pytest.raises(ChangedObject) as caught:
        storage.read(info.uri, etag=info.etag)

    assert caught.value.status is Status.CHANGED


def test_a_file_over_the_limit_is_refused_and_one_at_the_limit_read(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"12345")

    assert storage.read(str(path), max_bytes=5) == b"12345"
    with pytest.raises(ObjectTooLarge, match="5 bytes, and 4") as caught:
        storage.read(str(path), max_bytes=4)
    assert caught.value.status is Status.TOO_LARGE


def test_reading_a_folder_or_a_pipe_fails_instead_of_waiting(storage: Storage, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")

    for path in (tmp_path, tmp_path / "pipe.jpg"):
        with pytest.raises(StorageFailed) as caught:
            storage.read(str(path))
        assert caught.value.status is Status.FAILED


def test_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ChangedObject("s3://b/k changed")))

    assert (type(error), str(error), error.status) == (ChangedObject, "s3://b/k changed", Status.CHANGED)


def test_writing_replaces_and_leaves_nothing_beside(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"

    storage.write(str(path), b"one")
    storage.write(str(path), b"two")

    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["a.bin"]


@pytest.mark.parametrize("existing", [False, True])
def test_of_conditional_writers_at_once_only_one_succeeds(storage: Storage, tmp_path: Path, existing: bool) -> None:
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
def test_without_hard_links_too_only_one_of_many_writers_succeeds(tmp_path: Path, refused: list[str]) -> None:
    run_python(RACE, str(tmp_path / "lock"), *refused)

    assert os.listdir(tmp_path) == ["lock"]


WRITER = """
import os, signal, sys
from pathlib import Path
from agr_ray import storage

def stop(path):
    print("writing", flush=True)
    sys.stdin.read()  # alive until it is killed

if sys.argv[2] == "file":
    storage._write_local(sys.argv[1], stop)
else:
    with storage._temporary_beside(sys.argv[1]) as temporary:
        Path(temporary, "weights").write_bytes(b"x")
        stop(temporary)
"""


@pytest.mark.parametrize("kind", ["file", "tree"])
def test_what_a_killed_writer_left_is_deleted_and_a_live_ones_is_not(
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


def test_a_file_is_replaced_and_deleted_only_if_it_is_still_the_one_that_was_read(
    storage: Storage, tmp_path: Path
) -> None:
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


def test_a_writer_who_waited_for_a_file_that_was_replaced_meanwhile_does_not_replace_it_again(
    storage: Storage, tmp_path: Path
) -> None:
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


def test_a_file_is_copied_whole_or_not_at_all(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")

    storage.copy(str(tmp_path / "a"), str(tmp_path / "new" / "b"))
    with pytest.raises(MissingObject, match="none"):
        storage.copy(str(tmp_path / "none"), str(tmp_path / "new" / "b"))

    assert (tmp_path / "new" / "b").read_bytes() == b"x"
    assert os.listdir(tmp_path / "new") == ["b"]


def test_writing_below_a_file_is_one_clear_line(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")

    with pytest.raises(StorageUnavailable, match="can't be written"):
        storage.write(str(tmp_path / "file" / "a"), b"x")


def test_unfinished_files_are_not_listed(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / ".tmp-0").mkdir()
    (tmp_path / ".tmp-0" / "a.jpg").write_bytes(b"x")

    assert list(storage.list(str(tmp_path))) == []


def test_delete_and_exists(storage: Storage, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    storage.write(path, b"x")
    assert storage.exists(path)

    storage.delete(path)
    storage.delete(path)

    assert not storage.exists(path)
    assert storage.exists(str(tmp_path))


def test_absolute_gives_one_form_to_all_spellings_of_a_local_path(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = str(tmp_path / "a b%20")

    for uri in ("a b%20", "./a b%20/", str(tmp_path / "a b%20"), f"file://{tmp_path}/a%20b%2520"):
        assert storage.absolute(uri) == expected
    assert storage.absolute("s3://bucket/a//b%20/") == "s3://bucket/a//b%20/"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("gs://bucket/key", "'gs'"),
        ("https://host/key", "'https'"),
        ("s3:/bucket/key", "lost a slash"),
        ("file://host/path", "on this machine"),
        ("", "empty"),
    ],
)
def test_other_schemes_are_refused_with_what_is_allowed(storage: Storage, uri: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        storage.absolute(uri)

    assert "file:///path" in str(caught.value)


def test_an_s3_uri_without_bucket_or_key_is_refused(storage: Storage) -> None:
    with pytest.raises(ValueError, match="names no bucket"):
        storage.read("s3:///key")
    with pytest.raises(ValueError, match="names no key"):
        storage.read("s3://bucket/")


def test_join_keeps_what_is_in_an_s3_key(storage: Storage) -> None:
    assert storage.join("s3://bucket/a", "b c", "/d#.jpg") == "s3://bucket/a/b c//d#.jpg"
    assert storage.join("s3://bucket", "a") == "s3://bucket/a"
    assert storage.join("folder", "a") == "folder/a"


def test_a_tree_goes_up_and_down_whole(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "weights").write_bytes(b"w")
    (source / "meta.json").write_text("{}")
    uri = str(tmp_path / "out" / "checkpoint")

    storage.upload_tree(str(source), uri)
    storage.download_tree(uri, str(tmp_path / "back"))

    assert (tmp_path / "back" / "deep" / "weights").read_bytes() == b"w"
    assert sorted(os.listdir(tmp_path / "out")) == ["checkpoint"]


def test_an_existing_tree_is_replaced_only_when_asked(storage: Storage, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(name)
        (tmp_path / name / f"only-{name}").write_text("x")
    uri = str(tmp_path / "out")
    storage.upload_tree(str(tmp_path / "one"), uri)

    with pytest.raises(FileExistsError, match="not overwritten"):
        storage.upload_tree(str(tmp_path / "two"), uri)
    storage.upload_tree(str(tmp_path / "two"), uri, overwrite=True)

    assert sorted(os.listdir(uri)) == ["meta.json", "only-two"]


def test_a_tree_without_its_marker_is_no_tree(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()

    with pytest.raises(ValueError, match=r"meta\.json"):
        storage.upload_tree(str(tmp_path / "source"), str(tmp_path / "out"))
    with pytest.raises(MissingObject, match=r"meta\.json"):
        storage.download_tree(str(tmp_path / "source"), str(tmp_path / "back"))
    assert not (tmp_path / "out").exists()


def test_a_table_comes_back_as_written(storage: Storage, tmp_path: Path) -> None:
    table = pa.table({"key": ["a", None], "age": pa.array([1.5, None], pa.float32())})
    uri = str(tmp_path / "run=7" / "manifest.parquet")

    storage.write_table(table, uri)

    assert storage.read_table(uri).equals(table)
    assert storage.read_table(uri, ["age"]).column_names == ["age"]
    assert storage.read_table(str(tmp_path)).equals(table)  # with no column `run`


def test_a_table_that_is_not_parquet_or_not_there_is_named(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("not a table")

    with pytest.raises(StorageFailed, match=r"text\.parquet"):
        storage.read_table(str(tmp_path / "text.parquet"))
    with pytest.raises(MissingObject, match=r"none\.parquet"):
        storage.read_table(str(tmp_path / "none.parquet"))


def test_a_table_that_cannot_be_written_leaves_the_old_one(storage: Storage, tmp_path: Path) -> None:
    uri = str(tmp_path / "t.parquet")
    storage.write_table(pa.table({"a": [1]}), uri)
    unwritable = pa.table({"a": pa.array([], pa.null())}).append_column(
        "u", pa.UnionArray.from_sparse(pa.array([], pa.int8()), [])
    )

    with pytest.raises(pa.ArrowException):
        storage.write_table(unwritable, uri)

    assert storage.read_table(uri).column("a").to_pylist() == [1]
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="max_attempts is 0"):
        Storage(max_attempts=0)
    with pytest.raises(ValueError, match="request_timeout_s is 0"):
        Storage(request_timeout_s=0)


def test_a_tree_taken_away_by_a_writer_that_was_killed_is_put_back(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "meta.json").write_text("old")
    source = tmp_path / "source"
    source.mkdir()
    (source / "meta.json").write_text("new")
    process = os.fork()
    if not process:
        rename = os.rename

        def rename_or_die(old: str, new: str) -> None:
            if new == str(folder):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(old, new)

        os.rename = rename_or_die  # type: ignore[assignment]
        Storage().upload_tree(str(source), str(folder), overwrite=True)
    os.waitpid(process, 0)
    assert not folder.exists()

    process = os.fork()  # a process that has not cleaned this folder yet
    if not process:
        Storage().write(str(tmp_path / "other.txt"), b"x")
        os._exit(0)
    os.waitpid(process, 0)

    assert (folder / "meta.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "other.txt", "source"]


def test_a_file_that_a_stopped_writer_has_locked_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agr_ray.storage._MAX_FLOCK_S", 0.2)
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


def test_a_name_that_is_free_again_when_we_look_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
