"""boto3, pyarrow and s3fs send the same requests to the same S3, whatever AWS's variables and profiles say."""

from __future__ import annotations

import gzip
import pickle
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from botocore.exceptions import BotoCoreError
from cryptography import x509
from recording_s3 import Fake, Request, recording_s3

from agr_ray.config import EvaluateJob, Job, PrepareJob, ScoreJob, StorageConfig, TrainJob, TuneJob
from agr_ray.storage import ObjectTooLarge, Storage, StorageUnavailable

pytestmark = pytest.mark.timeout(60)

BUCKET = "bucket"
TABLE = pa.table({"a": [1, 2]})


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Set no AWS settings except a pair of keys, and ignore the machine's own settings."""
    import os

    for name in list(os.environ):
        if name.startswith(("AWS_", "FSSPEC_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return monkeypatch


def boto3_reads(storage: Storage, folder: Path) -> None:
    assert storage.read(f"s3://{BUCKET}/in/meta.json") == b"{}"


def boto3_lists(storage: Storage, folder: Path) -> None:
    assert [info.key for info in storage.list(f"s3://{BUCKET}/in")] == ["meta.json", "t.parquet"]


def pyarrow_writes_and_reads(storage: Storage, folder: Path) -> None:
    import pyarrow.parquet as pq

    # Pickled, as Ray sends it to its workers.
    filesystem, path = pickle.loads(pickle.dumps(storage.arrow_filesystem(f"s3://{BUCKET}/in/t.parquet")))
    pq.write_table(TABLE, path, filesystem=filesystem)
    assert pq.read_table(path, filesystem=filesystem).equals(TABLE)
    assert storage.read_table(f"s3://{BUCKET}/in/t.parquet").equals(TABLE)


def s3fs_downloads(storage: Storage, folder: Path) -> None:
    storage.download_tree(f"s3://{BUCKET}/in", str(folder / "down"))
    assert sorted(path.name for path in (folder / "down").iterdir()) == ["meta.json", "t.parquet"]


def trees_are_written_and_deleted(storage: Storage, folder: Path) -> None:
    (folder / "up").mkdir()
    (folder / "up" / "meta.json").write_text("{}")
    storage.upload_tree(str(folder / "up"), f"s3://{BUCKET}/up")
    storage.delete_tree(f"s3://{BUCKET}/up")


CLIENTS: list[Callable[[Storage, Path], None]] = [
    boto3_reads,
    pyarrow_writes_and_reads,
    boto3_lists,
    s3fs_downloads,
    trees_are_written_and_deleted,
]


def use_all_clients(fake: Fake, folder: Path, storage: Storage) -> list[Request]:
    """Use every client, and return the requests; both libraries must have sent some."""
    fake.objects["in/meta.json"] = b"{}"
    for use in CLIENTS:
        use(storage, folder)
    assert fake.sent("s3fs")
    assert fake.sent("boto3")
    return fake.sent()


def storage_at(fake: Fake | None = None, **settings: object) -> Storage:
    config = StorageConfig(endpoint_url=fake and fake.endpoint_url, timeout_s=5.0, max_attempts=1, **settings)
    return Storage.from_config(config)


def test_every_client_signs_with_the_keys_and_the_region(aws: pytest.MonkeyPatch, tmp_path: Path) -> None:
    aws.setenv("AWS_REGION", "eu-central-1")
    with recording_s3() as fake:
        requests = use_all_clients(fake, tmp_path, storage_at(fake))

    assert [(each.access_key, each.region) for each in requests] == [("KEY", "eu-central-1")] * len(requests)


def test_every_client_finds_the_region_of_the_bucket(tmp_path: Path) -> None:
    with recording_s3(region="eu-west-1") as fake:
        requests = use_all_clients(fake, tmp_path, storage_at(fake))

    # Each client is redirected once; each pickled filesystem makes a client of its own.
    assert {each.region for each in requests} == {"us-east-1", "eu-west-1"}
    assert [each.client for each in requests if each.region == "us-east-1"] == ["boto3", "boto3", "s3fs"]


# botocore renews keys that are valid for less than ten minutes before each request.
@pytest.mark.parametrize("expires_in_s", [3600, 300])
def test_every_client_assumes_the_role_of_the_profile_and_renews_its_keys(
    aws: pytest.MonkeyPatch, tmp_path: Path, expires_in_s: int
) -> None:
    (tmp_path / "config").write_text(
        "[profile worker]\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = base\nregion = eu-north-1\n"
    )
    (tmp_path / "credentials").write_text("[base]\naws_access_key_id = BASE\naws_secret_access_key = secret\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        aws.delenv(name)
    aws.setenv("AWS_PROFILE", "worker")
    with recording_s3(expires_in_s=expires_in_s) as fake:
        aws.setenv("AWS_ENDPOINT_URL", fake.endpoint_url)
        requests = use_all_clients(fake, tmp_path, storage_at())

    assert [each.access_key for each in fake.requests if each.path == "/"] == ["BASE"] * fake.sts_keys
    assert all(each.access_key.startswith("ASSUMED") and each.region == "eu-north-1" for each in requests)
    tokens = [each.headers["x-amz-security-token"] for each in requests]
    assert tokens == [each.access_key.replace("ASSUMED", "token-") for each in requests]
    # Kept by each client while they are valid; else new ones for each request.
    assert len(dict.fromkeys(tokens)) == (3 if expires_in_s == 3600 else len(requests))


def test_without_credentials_every_client_is_unsigned_only_if_anonymous(
    aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with recording_s3() as fake:
        requests = use_all_clients(fake, tmp_path, storage_at(fake, anonymous=True))
        assert [each.headers.get("authorization") for each in requests] == [None] * len(requests)

        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            aws.delenv(name)
        fake.requests.clear()
        with pytest.raises(StorageUnavailable, match=r"score\.input: bucket 'bucket' .* no usable keys"):
            storage_at(fake).probe(f"s3://{BUCKET}/in", "score.input")
        assert fake.requests == []


def test_every_client_agrees_to_pay(tmp_path: Path) -> None:
    with recording_s3() as fake:
        requests = use_all_clients(fake, tmp_path, storage_at(fake, requester_pays=True))

    assert [each.headers.get("x-amz-request-payer") for each in requests] == ["requester"] * len(requests)


def test_requester_pays_is_off_by_default(tmp_path: Path) -> None:
    with recording_s3() as fake:
        requests = use_all_clients(fake, tmp_path, storage_at(fake))

    assert [each.headers.get("x-amz-request-payer") for each in requests] == [None] * len(requests)


def test_anonymous_and_requester_pays_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"storage\.requester_pays: needs credentials"):
        StorageConfig(anonymous=True, requester_pays=True)


@pytest.mark.parametrize(("style", "host"), [("auto", "s3.test"), ("path", "s3.test"), ("virtual", "bucket.s3.test")])
def test_every_client_uses_the_configured_addressing_style(
    aws: pytest.MonkeyPatch, tmp_path: Path, style: str, host: str
) -> None:
    with recording_s3() as fake:
        aws.setenv("HTTP_PROXY", fake.endpoint_url)  # avoids a DNS lookup
        storage = Storage.from_config(StorageConfig(endpoint_url="http://s3.test", addressing_style=style))
        requests = use_all_clients(fake, tmp_path, storage)

    assert [each.host for each in requests] == [host] * len(requests)


def test_every_client_goes_through_the_proxy(aws: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with recording_s3() as fake:
        aws.setenv("HTTP_PROXY", fake.endpoint_url)
        aws.setenv("AWS_ENDPOINT_URL_S3", "http://s3.test")
        requests = use_all_clients(fake, tmp_path, storage_at())

    assert [each.host for each in requests] == ["s3.test"] * len(requests)


@pytest.mark.parametrize(
    ("variables", "host"),
    [
        ({}, "bucket.s3.amazonaws.com"),
        ({"AWS_REGION": "eu-west-1"}, "bucket.s3.eu-west-1.amazonaws.com"),
        ({"AWS_DEFAULT_REGION": "eu-west-1"}, "bucket.s3.eu-west-1.amazonaws.com"),
        ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "us-west-2"}, "bucket.s3.eu-west-1.amazonaws.com"),
        ({"AWS_REGION": "us-west-2", "AWS_USE_FIPS_ENDPOINT": "true"}, "bucket.s3-fips.us-west-2.amazonaws.com"),
        (
            {"AWS_REGION": "us-west-2", "AWS_USE_DUALSTACK_ENDPOINT": "true"},
            "bucket.s3.dualstack.us-west-2.amazonaws.com",
        ),
        ({"AWS_REGION": "cn-north-1"}, "bucket.s3.cn-north-1.amazonaws.com.cn"),
    ],
)
def test_every_client_goes_to_the_same_host_of_aws(
    aws: pytest.MonkeyPatch, variables: dict[str, str], host: str
) -> None:
    for name, value in variables.items():
        aws.setenv(name, value)
    with recording_s3() as fake:
        aws.setenv("HTTPS_PROXY", fake.endpoint_url)
        storage = storage_at()
        fs = storage.connection.s3fs_filesystem()
        filesystem, path = storage.arrow_filesystem(f"s3://{BUCKET}/in")
        for ask in (
            lambda: list(storage.list(f"s3://{BUCKET}/in")),
            lambda: fs.ls(path),
            lambda: filesystem.get_file_info(path),
        ):
            with pytest.raises((StorageUnavailable, OSError, BotoCoreError)):
                ask()
        asked = [(each.method, each.host) for each in fake.requests]

    assert list(dict.fromkeys(asked)) == [("CONNECT", f"{host}:443")]
    assert len(asked) >= 3


@pytest.mark.parametrize(("asked", "sent"), [("", False), ("when_required", False), ("when_supported", True)])
def test_a_custom_endpoint_gets_no_new_checksums_by_default(aws: pytest.MonkeyPatch, asked: str, sent: bool) -> None:
    if asked:
        aws.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", asked)
    with recording_s3() as fake:
        storage_at(fake).write(f"s3://{BUCKET}/a", b"x")

    assert [any(name.startswith("x-amz-checksum") for name in each.headers) for each in fake.sent()] == [sent]


def test_fsspec_settings_do_not_affect_s3fs(aws: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (
        "import pickle, sys; storage, folder = pickle.load(sys.stdin.buffer);"
        " storage.download_tree('s3://bucket/in', folder)"
    )
    aws.setenv("FSSPEC_S3_KEY", "ANOTHER")
    aws.setenv("FSSPEC_S3_SECRET", "one")
    with recording_s3() as fake:
        fake.objects["in/meta.json"] = b"{}"
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=pickle.dumps((storage_at(fake), str(tmp_path / "down"))),
            capture_output=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()

    assert {each.client: each.access_key for each in fake.sent()} == {"boto3": "KEY", "s3fs": "KEY"}


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Return a file with a new key and its own certificate of 127.0.0.1."""
    import datetime
    import ipaddress

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_every_client_trusts_the_certificates_of_the_bundle(
    aws: pytest.MonkeyPatch, tmp_path: Path, certificate: Path
) -> None:
    with recording_s3(certificate=certificate) as fake:
        with pytest.raises(StorageUnavailable, match=r"score\.out: bucket 'bucket': .*can't be reached"):
            storage_at(fake).probe(f"s3://{BUCKET}/out", "score.out")
        aws.setenv("AWS_CA_BUNDLE", str(certificate))
        use_all_clients(fake, tmp_path, storage_at(fake))


def test_a_probe_uses_every_client_and_writes_only_on_request(tmp_path: Path) -> None:
    with recording_s3() as fake:
        storage = storage_at(fake)
        storage.probe(str(tmp_path), "score.input")
        storage.probe(f"s3://{BUCKET}/in", "score.input")
        assert [(each.client, each.method) for each in fake.sent()] == [("boto3", "GET"), ("s3fs", "GET")]
        fake.requests.clear()
        storage.probe(f"s3://{BUCKET}/out", "score.out", write=True)

    assert [each.method for each in fake.sent()] == ["GET", "GET", "PUT", "DELETE"]
    assert fake.objects == {}


@pytest.mark.parametrize("client", ["boto3", "s3fs"])
def test_a_probe_finds_the_one_client_without_access(client: str) -> None:
    said = r"train\.data: bucket 'bucket' .* InvalidAccessKeyId"
    with recording_s3(refused_client=client) as fake, pytest.raises(StorageUnavailable, match=said) as caught:
        storage_at(fake).probe(f"s3://{BUCKET}/in", "train.data")

    assert "\n" not in str(caught.value)


S3, DISK = f"s3://{BUCKET}/x", "/nonexistent/agr-ray"


@pytest.mark.parametrize(
    ("job", "section", "key", "others"),
    [
        (PrepareJob, "source", "uri", {"prepare": {"out": DISK}}),
        (PrepareJob, "prepare", "out", {"source": {"uri": DISK}}),
        (TrainJob, "train", "data", {}),
        (TrainJob, "train", "out", {"train": {"data": DISK}}),
        (TuneJob, "tune", "out", {"train": {"data": DISK}}),
        (EvaluateJob, "evaluate", "data", {"evaluate": {"checkpoint": DISK}}),
        (EvaluateJob, "evaluate", "checkpoint", {"evaluate": {"data": DISK}}),
        (EvaluateJob, "evaluate", "out", {"evaluate": {"data": DISK, "checkpoint": DISK}}),
        (ScoreJob, "score", "input", {"score": {"checkpoint": DISK, "out": DISK}}),
        (ScoreJob, "score", "checkpoint", {"score": {"input": DISK, "out": DISK}}),
        (ScoreJob, "score", "out", {"score": {"input": DISK, "checkpoint": DISK}}),
    ],
)
def test_every_job_probes_each_input_and_output_before_any_work(
    job: type[Job], section: str, key: str, others: dict[str, dict[str, str]]
) -> None:
    import importlib

    name = job.__name__.removesuffix("Job").lower()
    work = getattr(importlib.import_module(f"agr_ray.runtime.{name}"), name)
    with recording_s3(refused_client="s3fs") as fake:
        sections = {**others, section: {**others.get(section, {}), key: S3}}
        if job is TuneJob:
            sections["tune"]["space"] = {"train.lr": {"log_uniform": [1e-4, 1e-3]}}
        made = job(**sections, storage={"endpoint_url": fake.endpoint_url, "max_attempts": 1})
        with pytest.raises(StorageUnavailable, match=rf"^{section}\.{key}: .*InvalidAccessKeyId"):
            work(made)

    assert [(each.client, each.method) for each in fake.sent()] == [("boto3", "GET"), ("s3fs", "GET")]


def test_a_probe_names_the_key_and_the_client_without_access() -> None:
    with recording_s3(undeletable=("out/.agr-ray-probe",)) as fake, pytest.raises(StorageUnavailable) as caught:
        storage_at(fake).probe(f"s3://{BUCKET}/out", "score.out", write=True)

    assert str(caught.value).startswith("score.out: bucket 'bucket'")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "code", ["MissingContentMD5", "InvalidRequest", "NotImplemented", "MalformedXML", "MethodNotAllowed"]
)
def test_without_bulk_deletes_objects_are_deleted_one_by_one(code: str) -> None:
    with recording_s3(no_multi_delete=code) as fake:
        fake.objects |= {f"work/{number}": b"x" for number in range(3)} | {"workshop": b"x"}
        storage_at(fake).delete_tree(f"s3://{BUCKET}/work")

    assert list(fake.objects) == ["workshop"]
    assert [each.method for each in fake.sent()] == ["GET", "POST", "DELETE", "DELETE", "DELETE"]


def test_denied_deletes_are_not_repeated_one_by_one() -> None:
    with recording_s3(no_multi_delete="SignatureDoesNotMatch") as fake:
        fake.objects["work/0"] = b"x"
        with pytest.raises(StorageUnavailable, match="SignatureDoesNotMatch"):
            storage_at(fake).delete_tree(f"s3://{BUCKET}/work")

    assert [each.method for each in fake.sent()] == ["GET", "POST"]


def test_an_undeletable_object_is_named_and_the_others_are_deleted() -> None:
    with recording_s3(undeletable=("work/1",)) as fake:
        fake.objects |= {f"work/{number}": b"x" for number in range(3)}
        with pytest.raises(StorageUnavailable, match="AccessDenied"):
            storage_at(fake).delete_tree(f"s3://{BUCKET}/work")

    assert list(fake.objects) == ["work/1"]


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


ZIPPED = gzipped(b"a photograph")


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
@pytest.mark.parametrize(
    ("stored", "read"),
    [
        (ZIPPED, b"a photograph"),
        (gzipped(b"a photo") + gzipped(b"graph"), b"a photograph"),
        (b"a photograph", b"a photograph"),
        (b"", b""),
    ],
    ids=["whole", "two members", "a wrong header", "empty"],
)
def test_objects_with_content_encoding_gzip_are_decoded(encoding: str, stored: bytes, read: bytes) -> None:
    with recording_s3(encoding=encoding) as fake:
        fake.objects["a.jpg"] = stored
        assert storage_at(fake).read(f"s3://{BUCKET}/a.jpg", max_bytes=10**6) == read


def test_a_damaged_gzip_body_is_read_up_to_the_damage() -> None:
    whole = bytes(random.Random(0).randbytes(10**6))
    zipped = gzipped(whole)
    with recording_s3(encoding="gzip") as fake:
        fake.objects |= {"cut": zipped[: -(10**5)], "damaged": zipped[: 5 * 10**5] + bytes(1000) + zipped[5 * 10**5 :]}
        found = [storage_at(fake).read(f"s3://{BUCKET}/{name}", max_bytes=10**7) for name in ("cut", "damaged")]

    for data in found:
        assert len(data) > 3 * 10**5
    assert whole.startswith(found[0])
    assert found[1][: 3 * 10**5] == whole[: 3 * 10**5]


def test_gzip_files_without_content_encoding_are_not_decoded() -> None:
    with recording_s3() as fake:
        fake.objects["a.gz"] = ZIPPED
        assert storage_at(fake).read(f"s3://{BUCKET}/a.gz") == ZIPPED


def test_a_gzip_bomb_is_too_large_and_a_body_at_the_limit_is_read() -> None:
    with recording_s3(encoding="gzip") as fake:
        fake.objects |= {"bomb.jpg": gzipped(bytes(10**8)), "a.jpg": gzipped(bytes(10**5))}
        storage = storage_at(fake)
        assert storage.read(f"s3://{BUCKET}/a.jpg", max_bytes=10**5) == bytes(10**5)
        with pytest.raises(ObjectTooLarge, match="more than 99999 bytes"):
            storage.read(f"s3://{BUCKET}/a.jpg", max_bytes=10**5 - 1)
        tracemalloc.start()
        with pytest.raises(ObjectTooLarge):
            storage.read(f"s3://{BUCKET}/bomb.jpg", max_bytes=10**6)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    assert peak < 10**7
