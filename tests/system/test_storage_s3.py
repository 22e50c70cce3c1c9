"""Storage on a real S3 server (SeaweedFS), and on sockets that misbehave as no real server can be made to."""

from __future__ import annotations

import contextlib
import gc
import http.server
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError
from seaweedfs import S3Server
from servers import free_ports

from agr_ray.schema import Status
from agr_ray.storage import (
    ArchivedObject,
    ChangedObject,
    Connection,
    MissingObject,
    NotParquet,
    ObjectTooLarge,
    ServerFailed,
    Storage,
    StorageFailed,
    StorageUnavailable,
)

pytestmark = pytest.mark.timeout(120)

ODD_KEYS = ["a b.jpg", "ünï/日本.jpg", "p%20q%.jpg", "h#h.jpg", "e=1/f+g.jpg", "q?x&y.jpg", "new\nline.jpg"]


def make_storage() -> Storage:
    return Storage(Connection(timeout_s=5, max_attempts=2))


@pytest.fixture(scope="module")
def storage() -> Storage:
    """Return one storage for all tests that do not change the variables, because making its clients takes long."""
    return make_storage()


@contextlib.contextmanager
def canned_server(answers: list[bytes]) -> Iterator[tuple[str, list[str]]]:
    """Answer each request with the next of the raw answers, the last for ever; yield the endpoint and the requests."""
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.wfile.write(answers[min(len(seen), len(answers)) - 1])
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()
            thread.join()


def raw_answer(status: str, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f'HTTP/1.1 {status}\r\nETag: "e"\r\nContent-Length: {size}\r\n\r\n'.encode() + body


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys_are_listed_and_read_back(storage: Storage, s3_root: str, key: str) -> None:
    uri = storage.join(s3_root, "in", key)
    storage.write(uri, key.encode())

    (info,) = storage.list(storage.join(s3_root, "in"))

    assert (info.uri, info.key, info.size_bytes) == (uri, key, len(key.encode()))
    assert storage.read(info.uri, etag=info.etag) == key.encode()
    assert storage.exists(uri)


def test_listing_follows_pages_in_order_and_filters_suffixes(
    storage: Storage, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"{number:04d}.jpg" for number in range(23)]
    for key in [*keys, "note.txt"]:
        storage.write(f"{s3_root}/in/{key}", b"x")
    monkeypatch.setattr("agr_ray.storage.s3._KEYS_PER_PAGE", 10)

    assert [info.key for info in storage.list(f"{s3_root}/in/", [".JPG"])] == keys


def test_a_prefix_lists_neither_similar_prefixes_nor_directories(
    storage: Storage, s3_root: str, s3_environment: S3Server
) -> None:
    storage.write(f"{s3_root}/in/a.jpg", b"x")
    storage.write(f"{s3_root}/in2/b.jpg", b"x")
    bucket, _, prefix = s3_root.removeprefix("s3://").partition("/")
    s3_environment.client().put_object(Bucket=bucket, Key=f"{prefix}/in/folder/", Body=b"")

    assert [info.key for info in storage.list(f"{s3_root}/in")] == ["a.jpg"]
    assert {info.key for info in storage.list(s3_root)} == {"in/a.jpg", "in2/b.jpg"}


def test_a_key_with_two_slashes_is_read_under_its_own_name(storage: Storage, s3_root: str) -> None:
    storage.write(f"{s3_root}/in//a.jpg", b"x")

    (info,) = storage.list(f"{s3_root}/in")

    # S3 keeps both slashes; SeaweedFS lists the object with one, and reads it under either name.
    assert info.uri in (f"{s3_root}/in//a.jpg", f"{s3_root}/in/a.jpg")
    assert storage.join(f"{s3_root}/in", info.key) == info.uri
    assert storage.read(info.uri, etag=info.etag) == storage.read(f"{s3_root}/in//a.jpg") == b"x"


def test_a_listed_etag_reads_the_object_and_another_is_rejected(storage: Storage, s3_root: str) -> None:
    uri = f"{s3_root}/a.jpg"
    storage.write(uri, b"old")
    (info,) = storage.list(s3_root)
    assert storage.read(uri, etag=info.etag) == b"old"
    storage.write(uri, b"new")

    with pytest.raises(ChangedObject, match=r"a\.jpg") as caught:
        storage.read(uri, etag=info.etag)

    assert caught.value.status is Status.CHANGED


@pytest.mark.parametrize("etag", [None, "0" * 32])
def test_a_missing_key_is_missing_with_and_without_etag(storage: Storage, s3_root: str, etag: str | None) -> None:
    with pytest.raises(MissingObject, match=r"gone\.jpg") as caught:
        storage.read(f"{s3_root}/gone.jpg", etag=etag)

    assert caught.value.status is Status.MISSING
    assert not storage.exists(f"{s3_root}/gone.jpg")


def test_an_object_over_the_limit_is_rejected(storage: Storage, s3_root: str) -> None:
    storage.write(f"{s3_root}/a.jpg", b"12345")

    assert storage.read(f"{s3_root}/a.jpg", max_bytes=5) == b"12345"
    with pytest.raises(ObjectTooLarge, match="5 bytes, and 4"):
        storage.read(f"{s3_root}/a.jpg", max_bytes=4)


def test_an_empty_object_is_read(storage: Storage, s3_root: str) -> None:
    storage.write(f"{s3_root}/a.jpg", b"")

    (info,) = storage.list(s3_root)

    assert (info.size_bytes, storage.read(info.uri, etag=info.etag)) == (0, b"")


@pytest.mark.parametrize("existing", [False, True])
def test_only_one_of_concurrent_conditional_writers_succeeds(storage: Storage, s3_root: str, existing: bool) -> None:
    etag = storage.write(f"{s3_root}/lock", b"old") if existing else None

    def write(number: int) -> int | None:
        try:
            storage.write(f"{s3_root}/lock", str(number).encode(), if_absent=not existing, if_match=etag)
        except (FileExistsError, ChangedObject):
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(write, range(8)) if number is not None]

    assert [str(number).encode() for number in winners] == [storage.read(f"{s3_root}/lock")]


def test_an_object_is_replaced_or_deleted_only_if_unchanged_since_it_was_read(storage: Storage, s3_root: str) -> None:
    uri = f"{s3_root}/a"
    first = storage.write(uri, b"first")
    assert storage.read_with_etag(uri) == (b"first", first)
    second = storage.write(uri, b"second", if_match=first)

    with pytest.raises(ChangedObject):
        storage.write(uri, b"third", if_match=first)
    with pytest.raises(ChangedObject):
        storage.delete(uri, if_match=first)
    assert storage.read_with_etag(uri) == (b"second", second)
    storage.delete(uri, if_match=second)
    assert not storage.exists(uri)
    # AWS says that there is no such key; SeaweedFS that the condition does not hold.
    with pytest.raises((ChangedObject, MissingObject)):
        storage.write(uri, b"third", if_match=second)


def test_an_object_is_copied_by_the_server_and_from_a_local_file(
    storage: Storage, s3_root: str, tmp_path: Path
) -> None:
    (tmp_path / "local").write_bytes(b"local")
    storage.write(f"{s3_root}/a b%+é", b"remote")

    storage.copy(f"{s3_root}/a b%+é", f"{s3_root}/run=7/copy #")
    storage.copy(str(tmp_path / "local"), f"{s3_root}/up")

    assert storage.read(f"{s3_root}/run=7/copy #") == b"remote"
    assert storage.read(f"{s3_root}/up") == b"local"
    with pytest.raises(MissingObject, match="none"):
        storage.copy(f"{s3_root}/none", f"{s3_root}/up")
    storage.move(f"{s3_root}/run=7/copy #", f"{s3_root}/moved")
    assert (storage.exists(f"{s3_root}/moved"), storage.exists(f"{s3_root}/run=7/copy #")) == (True, False)
    with pytest.raises(MissingObject):
        storage.move(f"{s3_root}/run=7/copy #", f"{s3_root}/moved")


def test_delete_and_exists(storage: Storage, s3_root: str) -> None:
    storage.write(f"{s3_root}/run/a", b"x")
    storage.write(f"{s3_root}/run-2/a", b"x")
    assert storage.exists(f"{s3_root}/run")

    storage.delete(f"{s3_root}/run/a")
    storage.delete(f"{s3_root}/run/a")

    assert not storage.exists(f"{s3_root}/run/a")
    assert not storage.exists(f"{s3_root}/run")
    assert storage.exists("s3://tests")


def test_a_prefix_is_a_folder_unless_an_object_has_its_key(storage: Storage, s3_root: str) -> None:
    for key in ("run/a", "run-2/a", "both/a", "both"):
        storage.write(f"{s3_root}/{key}", b"x")

    keys = ("run", "run/", "ru", "run/a", "both", "gone")
    assert [storage.is_folder(f"{s3_root}/{key}") for key in keys] == [True, True, False, False, False, False]
    assert storage.is_folder("s3://tests")


ACTIONS = {
    "list": lambda storage, uri, _: list(storage.list(uri)),
    "read": lambda storage, uri, _: storage.read(uri + "/a.jpg"),
    "write": lambda storage, uri, _: storage.write(uri + "/b.jpg", b"x"),
    "exists": lambda storage, uri, _: storage.exists(uri + "/a.jpg"),
    "read_table": lambda storage, uri, _: storage.read_table(uri + "/a.parquet"),
    "write_table": lambda storage, uri, _: storage.write_table(pa.table({"a": [1]}), uri + "/b.parquet"),
    "upload_tree": lambda storage, uri, folder: storage.upload_tree(str(folder), uri + "/tree"),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "w%20 #.bin").write_bytes(b"w")
    (folder / "meta.json").write_text("{}")
    return folder


@pytest.mark.parametrize("action", ACTIONS)
def test_a_missing_bucket_gives_one_line(storage: Storage, s3_environment: S3Server, tree: Path, action: str) -> None:
    with pytest.raises(StorageUnavailable, match="bucket 'no-such-bucket' does not exist") as caught:
        ACTIONS[action](storage, "s3://no-such-bucket/in", tree)

    assert s3_environment.endpoint_url in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys_give_one_line_without_the_keys(
    storage: Storage, s3_root: str, tree: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    storage.write(f"{s3_root}/a.jpg", b"x")
    storage.write_table(pa.table({"a": [1]}), f"{s3_root}/a.parquet")
    monkeypatch.setenv(variable, "wrong-one")
    refused = make_storage()

    for action in ACTIONS.values():
        with pytest.raises(StorageUnavailable, match=r"bucket 'tests' at .* refuses these keys") as caught:
            action(refused, s3_root, tree)
        assert "wrong-one" not in str(caught.value)


def test_no_keys_at_all_says_which_variables_to_set(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    with pytest.raises(StorageUnavailable, match="set AWS_ACCESS_KEY_ID"):
        list(make_storage().list(s3_root))


def test_an_unreachable_endpoint_is_named_in_the_error(s3_environment: S3Server) -> None:
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    storage = Storage(Connection(endpoint_url=endpoint, timeout_s=2, max_attempts=1))

    with pytest.raises(StorageUnavailable, match=f"{endpoint}.* can't be reached"):
        list(storage.list("s3://bucket/in"))


def test_a_malformed_endpoint_is_named_in_the_error(s3_environment: S3Server) -> None:
    with pytest.raises(StorageUnavailable, match="not-a-url"):
        list(Storage(Connection(endpoint_url="not-a-url")).list("s3://bucket/in"))


def test_a_server_that_keeps_failing_gives_a_status_after_the_retries(s3_environment: S3Server) -> None:
    with canned_server([raw_answer("503 Slow Down", b"")]) as (endpoint, requests):
        storage = Storage(Connection(endpoint_url=endpoint, timeout_s=2, max_attempts=2))
        with pytest.raises(ServerFailed, match=r"a\.jpg") as caught:
            storage.read("s3://bucket/a.jpg")

    assert caught.value.status is Status.FAILED
    assert len(requests) == 2


def test_a_truncated_body_is_read_again(s3_environment: S3Server) -> None:
    answers = [raw_answer("200 OK", b"ha", length=5), raw_answer("200 OK", b"whole")]
    with canned_server(answers) as (endpoint, _):
        storage = Storage(Connection(endpoint_url=endpoint, timeout_s=2, max_attempts=2))

        assert storage.read("s3://bucket/a.jpg") == b"whole"


def test_a_body_that_is_always_truncated_fails(s3_environment: S3Server) -> None:
    with canned_server([raw_answer("200 OK", b"ha", length=5)]) as (endpoint, requests):
        storage = Storage(Connection(endpoint_url=endpoint, timeout_s=2, max_attempts=2))
        with pytest.raises(StorageFailed, match="broke off 2 times"):
            storage.read("s3://bucket/a.jpg")

    assert len(requests) == 2


def test_a_server_that_ignores_if_match_is_detected(s3_environment: S3Server) -> None:
    with canned_server([raw_answer("200 OK", b"other")]) as (endpoint, _):
        storage = Storage(Connection(endpoint_url=endpoint, timeout_s=2, max_attempts=1))
        with pytest.raises(ChangedObject):
            storage.read("s3://bucket/a.jpg", etag="listed")


def test_access_denied_to_an_object_gives_a_status_and_to_a_listing_an_error(s3_environment: S3Server) -> None:
    body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
    with canned_server([raw_answer("403 Forbidden", body)]) as (endpoint, _):
        storage = Storage(Connection(endpoint_url=endpoint, timeout_s=2, max_attempts=1))
        with pytest.raises(StorageFailed, match="AccessDenied") as caught:
            storage.read("s3://bucket/a.jpg")
        assert not isinstance(caught.value, ServerFailed)  # asked again, it would say the same
        with pytest.raises(StorageUnavailable, match="AccessDenied"):
            list(storage.list("s3://bucket/in"))


@pytest.mark.parametrize(
    ("said", "named"), [("<StorageClass>GLACIER</StorageClass>", "class GLACIER"), ("", "archived")]
)
def test_an_archived_object_is_requested_once(s3_environment: S3Server, said: str, named: str) -> None:
    body = f"<Error><Code>InvalidObjectState</Code><Message>no</Message>{said}</Error>"
    with canned_server([raw_answer("403 Forbidden", body.encode())]) as (endpoint, requests):
        storage = Storage(Connection(endpoint_url=endpoint, timeout_s=2, max_attempts=2))
        with pytest.raises(ArchivedObject, match=named) as caught:
            storage.read("s3://bucket/a.jpg")

    assert caught.value.status is Status.ARCHIVED
    assert len(requests) == 1


def test_a_listing_has_storage_classes_and_restored_copies(s3_environment: S3Server) -> None:
    restored = "<RestoreStatus><RestoreExpiryDate>2030-01-01T00:00:00Z</RestoreExpiryDate></RestoreStatus>"
    running = "<RestoreStatus><IsRestoreInProgress>true</IsRestoreInProgress></RestoreStatus>"
    classes = ["<StorageClass>GLACIER</StorageClass>" + more for more in (restored, running, "")]
    entries = [
        f"<Contents><Key>{key}.jpg</Key><ETag>&quot;e&quot;</ETag><Size>1</Size>{more}</Contents>"
        for key, more in zip("abcde", [*classes, "<StorageClass>STANDARD</StorageClass>", ""], strict=True)
    ]
    body = f"<ListBucketResult>{''.join(entries)}<IsTruncated>false</IsTruncated></ListBucketResult>".encode()
    with canned_server([raw_answer("200 OK", body)]) as (endpoint, _):
        infos = list(Storage(Connection(endpoint_url=endpoint, timeout_s=2, max_attempts=1)).list("s3://bucket"))

    assert [info.storage_class for info in infos] == ["GLACIER restored", "GLACIER", "GLACIER", "STANDARD", None]


def test_a_tree_is_uploaded_and_downloaded_completely(
    storage: Storage, s3_root: str, tree: Path, tmp_path: Path
) -> None:
    uri = f"{s3_root}/out/a checkpoint"

    storage.upload_tree(str(tree), uri)
    storage.download_tree(uri, str(tmp_path / "back"))

    assert {info.key for info in storage.list(uri)} == {"deep/w%20 #.bin", "meta.json"}
    assert (tmp_path / "back" / "deep" / "w%20 #.bin").read_bytes() == b"w"
    assert sorted(os.listdir(tmp_path)) == ["back", "tree"]


def test_an_existing_tree_is_replaced_only_on_request(storage: Storage, s3_root: str, tree: Path) -> None:
    uri = f"{s3_root}/out"
    storage.upload_tree(str(tree), uri)
    (tree / "deep" / "w%20 #.bin").rename(tree / "other")

    with pytest.raises(FileExistsError, match="not overwritten"):
        storage.upload_tree(str(tree), uri)
    storage.upload_tree(str(tree), uri, overwrite=True)

    assert {info.key for info in storage.list(uri)} == {"other", "meta.json"}


def test_a_tree_whose_upload_died_is_not_downloaded_and_can_be_uploaded_again(
    storage: Storage, s3_root: str, tree: Path, tmp_path: Path
) -> None:
    uri = f"{s3_root}/out"
    storage.write(f"{uri}/half", b"x")

    with pytest.raises(MissingObject, match=r"no meta\.json"):
        storage.download_tree(uri, str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()
    storage.upload_tree(str(tree), uri)

    assert {info.key for info in storage.list(uri)} == {"deep/w%20 #.bin", "meta.json"}


def test_the_marker_is_the_newest_object_of_a_tree(
    storage: Storage, s3_root: str, tree: Path, s3_environment: S3Server
) -> None:
    (tree / "zz-last-by-name").write_bytes(b"x")
    storage.upload_tree(str(tree), f"{s3_root}/out")

    bucket, _, prefix = s3_root.removeprefix("s3://").partition("/")
    objects = s3_environment.client().list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]

    newest = max(each["LastModified"] for each in objects)
    assert f"{prefix}/out/meta.json" in [each["Key"] for each in objects if each["LastModified"] == newest]


def test_delete_tree_deletes_only_what_is_below(storage: Storage, s3_root: str, tree: Path) -> None:
    storage.upload_tree(str(tree), f"{s3_root}/out")
    storage.write(f"{s3_root}/out2", b"x")

    storage.delete_tree(f"{s3_root}/out")
    storage.delete_tree(f"{s3_root}/out")

    assert [info.key for info in storage.list(s3_root)] == ["out2"]
    with pytest.raises(ValueError, match="names no key"):
        storage.delete_tree("s3://tests")


@pytest.mark.parametrize("name", ["m.parquet", "run=7/a b#%+.parquet"])
def test_a_table_is_read_as_it_was_written(storage: Storage, s3_root: str, name: str) -> None:
    table = pa.table({"key": ["a", None], "age": pa.array([1.5, None], pa.float32())})

    storage.write_table(table, f"{s3_root}/{name}")

    assert storage.read_table(f"{s3_root}/{name}").equals(table)
    assert [info.key for info in storage.list(s3_root)] == [name]


def test_a_folder_of_tables_is_read_as_one(storage: Storage, s3_root: str) -> None:
    for part in range(3):
        storage.write_table(pa.table({"a": [part]}), f"{s3_root}/run=7/{part}.parquet")

    table = storage.read_table(f"{s3_root}/run=7")

    assert table.column_names == ["a"]
    assert sorted(table.column("a").to_pylist()) == [0, 1, 2]


def test_an_absent_or_non_parquet_table_is_named_in_the_error(storage: Storage, s3_root: str) -> None:
    storage.write(f"{s3_root}/text.parquet", b"not a table")

    with pytest.raises(MissingObject, match=r"none\.parquet"):
        storage.read_table(f"{s3_root}/none.parquet")
    with pytest.raises(NotParquet, match=r"text\.parquet"):
        storage.read_table(f"{s3_root}/text.parquet")


def test_the_endpoint_can_come_from_configuration_for_all_clients(
    s3_environment: S3Server, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    connection = Connection(endpoint_url=s3_environment.endpoint_url, region=s3_environment.region)
    storage = Storage(connection)

    storage.write(f"{s3_root}/a", b"x")
    arrow, path = storage.arrow_filesystem(f"{s3_root}/a")

    assert arrow.get_file_info(path).size == 1
    assert connection.s3fs_filesystem().cat_file(path) == b"x"


def test_storage_works_in_another_process_after_pickling(storage: Storage, s3_root: str) -> None:
    storage.write(f"{s3_root}/a", b"from the first")
    code = "import pickle, sys; storage, uri = pickle.load(sys.stdin.buffer); print(storage.read(uri).decode())"

    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((storage, f"{s3_root}/a")),
        capture_output=True,
        timeout=60,
        check=False,
    )

    assert done.stdout == b"from the first\n", done.stderr.decode()


def test_arrow_filesystem_writes_what_boto_lists(storage: Storage, s3_root: str) -> None:
    fs, path = storage.arrow_filesystem(f"{s3_root}/crops/part=1/a.parquet")
    pq.write_table(pa.table({"a": [1]}), path, filesystem=fs)

    (info,) = storage.list(f"{s3_root}/crops", [".parquet"])

    assert storage.read(info.uri, etag=info.etag)[:4] == b"PAR1"


def test_ray_train_copies_lists_and_deletes_checkpoints(storage: Storage, s3_root: str, tmp_path: Path) -> None:
    from ray.train._internal import storage as ray_storage

    fs, path = pickle.loads(pickle.dumps(storage.arrow_filesystem(f"{s3_root}/run")))
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "meta.json").write_text("{}")
    (source / "deep" / "er" / "weights").write_bytes(os.urandom(20 * 1024**2))
    (source / "empty").write_bytes(b"")

    ray_storage._create_directory(fs, path)
    for name in ("checkpoint_0", "checkpoint_1"):
        ray_storage._pyarrow_fs_copy_files(str(source), f"{path}/{name}", destination_filesystem=fs)
    listed = sorted(ray_storage._list_at_fs_path(fs, path))
    ray_storage._pyarrow_fs_copy_files(f"{path}/checkpoint_1", str(tmp_path / "back"), source_filesystem=fs)
    ray_storage._delete_fs_path(fs, f"{path}/checkpoint_0")

    assert listed == ["checkpoint_0", "checkpoint_1"]
    for name in ("meta.json", "deep/er/weights", "empty"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert [info.key for info in storage.list(s3_root)] == [
        f"run/checkpoint_1/{name}" for name in ("deep/er/weights", "empty", "meta.json")
    ]
    assert not ray_storage._exists_at_fs_path(fs, f"{path}/checkpoint_0")
    assert ray_storage._list_at_fs_path(fs, f"{path}/none") == []


def test_arrow_filesystem_reports_existing_files(storage: Storage, s3_root: str) -> None:
    for key in ("a", "f/b", "f/g/c"):
        storage.write(f"{s3_root}/{key}", b"x")
    fs, path = storage.arrow_filesystem(s3_root)
    folder, file, nothing = pafs.FileType.Directory, pafs.FileType.File, pafs.FileType.NotFound

    found = [fs.get_file_info(f"{path}/{name}").type for name in ("a", "f", "f/b", "none", "f/", "fo")]
    flat = [(info.path, info.type) for info in fs.get_file_info(pafs.FileSelector(path))]
    deep = [(info.path, info.type) for info in fs.get_file_info(pafs.FileSelector(path, recursive=True))]

    assert found == [file, folder, file, nothing, folder, nothing]
    assert flat == [(f"{path}/f", folder), (f"{path}/a", file)]
    assert deep == [
        *((f"{path}/{name}", folder) for name in ("f", "f/g")),
        *((f"{path}/{name}", file) for name in ("a", "f/b", "f/g/c")),
    ]
    with pytest.raises(FileNotFoundError):
        fs.get_file_info(pafs.FileSelector(f"{path}/none"))
    with pytest.raises(FileNotFoundError):
        fs.open_input_file(f"{path}/none")


def test_a_table_replaced_while_it_is_read_is_not_mixed_with_the_new_one(storage: Storage, s3_root: str) -> None:
    uri = f"{s3_root}/t.parquet"
    storage.write_table(pa.table({"a": range(10**5)}), uri)
    fs, path = storage.arrow_filesystem(uri)
    with pq.ParquetFile(path, filesystem=fs) as file:
        storage.write_table(pa.table({"a": range(1, 10**5)}), uri)
        with pytest.raises(ChangedObject):
            file.read()


def test_a_file_that_is_not_closed_is_not_published(storage: Storage, s3_root: str) -> None:
    fs, path = storage.arrow_filesystem(f"{s3_root}/half")
    stream = fs.open_output_stream(path)
    stream.write(b"half")
    del stream
    gc.collect()

    assert not storage.exists(f"{s3_root}/half")


def test_the_server_handles_conditional_writes_as_documented(s3_root: str, s3_environment: S3Server) -> None:
    """Check the probed behaviour of this SeaweedFS, so that an update that changes it is noticed."""
    client = s3_environment.client()
    bucket, _, prefix = s3_root.removeprefix("s3://").partition("/")
    client.put_object(Bucket=bucket, Key=f"{prefix}//a", Body=b"x")

    with pytest.raises(ClientError, match="NoSuchKey"):
        client.get_object(Bucket=bucket, Key="none", IfMatch='"0"')
    assert [each["Key"] for each in client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]] == [f"{prefix}/a"]
