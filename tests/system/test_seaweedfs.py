"""The S3 server gives access only to clients with an identity's keys or the server's certificate."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import grpc
import pytest
import requests
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError
from seaweedfs import Bucket, S3Server, run_seaweedfs

pytestmark = pytest.mark.timeout(120)

BODY = b"a photograph"
GRPC_PORTS = ("master.port.grpc", "volume.port.grpc", "filer.port.grpc", "s3.port.grpc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a comma in its name; SeaweedFS would split its absolute path in two."""
    return tmp_path_factory.mktemp("seaweedfs") / "a server, and its data"


@pytest.fixture(scope="module")
def bucket(folder: Path) -> Iterator[Bucket]:
    with run_seaweedfs(folder) as server:
        yield Bucket.create(server, "photographs")


@pytest.fixture(autouse=True)
def _photograph(bucket: Bucket) -> Iterator[None]:
    """Put the object that all tests try to reach, and check after each test that it is still there."""
    bucket.put("day/one.jpg", BODY)
    yield
    assert bucket.get("day/one.jpg") == BODY
    assert bucket.keys("") == ["day/one.jpg"]


def port_of(bucket: Bucket, name: str) -> int:
    assert isinstance(bucket.server, S3Server)
    (port,) = [
        int(value)
        for option, _, value in (word.partition("=") for word in bucket.server.weed.command)
        if option == f"-{name}"
    ]
    return port


def sockets(bucket: Bucket) -> list[Path]:
    """Return the paths of the sockets that the server makes. A server of an earlier test may have used its ports."""
    names = [name.removesuffix(".grpc").replace(".port", "-grpc") for name in GRPC_PORTS] + ["filer", "s3"]
    numbers = [port_of(bucket, name) for name in (*GRPC_PORTS, "filer.port", "s3.port")]
    return [Path(f"/tmp/seaweedfs-{name}-{number}.sock") for name, number in zip(names, numbers, strict=True)]


def certificate(folder: Path) -> tuple[str, str]:
    return str(folder / "keys" / "certificate.pem"), str(folder / "keys" / "key.pem")


def file_id(bucket: Bucket, folder: Path) -> str:
    """Return the volume server's file id of the object, requested with the certificate."""
    url = f"https://127.0.0.1:{port_of(bucket, 'filer.port')}/buckets/photographs/day/one.jpg?metadata=true"
    said = requests.get(url, cert=certificate(folder), verify=certificate(folder)[0], timeout=10)
    return str(said.json()["chunks"][0]["file_id"])


@pytest.mark.parametrize(
    ("part", "method", "path"),
    [
        ("filer", "GET", "/buckets/photographs/day/one.jpg"),
        ("filer", "GET", "/buckets/photographs/"),
        ("filer", "PUT", "/buckets/photographs/day/one.jpg"),
        ("filer", "POST", "/buckets/photographs/day/two.jpg"),
        ("filer", "DELETE", "/buckets/photographs/day/one.jpg"),
        ("filer", "DELETE", "/buckets/photographs?recursive=true"),
        ("volume", "GET", "/FILE_ID"),
        ("volume", "POST", "/FILE_ID"),
        ("volume", "DELETE", "/FILE_ID"),
        ("volume", "GET", "/status"),
        ("master", "GET", "/dir/assign"),
        ("master", "GET", "/dir/lookup?volumeId=1"),
        ("master", "POST", "/submit"),
        ("master", "GET", "/col/delete?collection=photographs"),
    ],
)
def test_no_http_port_but_that_of_s3_answers_without_the_certificate(
    bucket: Bucket, folder: Path, part: str, method: str, path: str
) -> None:
    path = path.replace("FILE_ID", file_id(bucket, folder))
    files = {"file": b"replaced"} if method in ("PUT", "POST") else None

    for scheme in ("http", "https"):
        url = f"{scheme}://127.0.0.1:{port_of(bucket, f'{part}.port')}{path}"
        try:
            with warnings.catch_warnings(action="ignore"):  # the server's certificate is not verified
                answer = requests.request(method, url, files=files, verify=False, timeout=10)
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            continue  # it disconnects clients without a certificate, before or during its answer
        assert (answer.status_code, answer.text.strip()) == (400, "Client sent an HTTP request to an HTTPS server.")


def test_the_certificate_gives_access_to_an_object_on_the_volume_server(bucket: Bucket, folder: Path) -> None:
    url = f"https://127.0.0.1:{port_of(bucket, 'volume.port')}/{file_id(bucket, folder)}"

    answer = requests.get(url, cert=certificate(folder), verify=certificate(folder)[0], timeout=10)

    assert answer.content == BODY


def looked_up(channel: grpc.Channel) -> Any:
    """Ask the filer for the entry of the object, in protobuf by hand; return the answer's bytes or the error's code."""
    request = b"".join(
        bytes([tag, len(text)]) + text for tag, text in ((0x0A, b"/buckets/photographs/day"), (0x12, b"one.jpg"))
    )
    with channel:
        try:
            return channel.unary_unary("/filer_pb.SeaweedFiler/LookupDirectoryEntry")(request, timeout=10)
        except grpc.RpcError as error:
            return error.code()


@pytest.mark.parametrize("port", GRPC_PORTS)
def test_no_grpc_port_answers_without_the_certificate(bucket: Bucket, folder: Path, port: str) -> None:
    address = f"127.0.0.1:{port_of(bucket, port)}"
    trusted = Path(certificate(folder)[0]).read_bytes()

    for channel in (
        grpc.insecure_channel(address),
        grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted)),
    ):
        assert looked_up(channel) is grpc.StatusCode.UNAVAILABLE


def test_the_certificate_gives_access_to_an_object_by_grpc(bucket: Bucket, folder: Path) -> None:
    shown, key = (Path(path).read_bytes() for path in certificate(folder))
    credentials = grpc.ssl_channel_credentials(shown, key, shown)

    answer = looked_up(grpc.secure_channel(f"127.0.0.1:{port_of(bucket, 'filer.port.grpc')}", credentials))

    assert b"one.jpg" in answer


def test_s3_rejects_missing_and_wrong_keys(bucket: Bucket) -> None:
    unsigned = boto3.client(
        "s3",
        endpoint_url=bucket.server.endpoint_url,
        region_name="us-east-1",
        config=Config(signature_version=UNSIGNED, s3={"addressing_style": "path"}),
    )
    wrong = S3Server(bucket.server.endpoint_url, "test-access-key", "wrong", bucket.server.weed).client()

    for client in (unsigned, wrong):
        for call in (
            lambda client=client: client.get_object(Bucket="photographs", Key="day/one.jpg"),
            lambda client=client: client.put_object(Bucket="photographs", Key="day/one.jpg", Body=b"replaced"),
            lambda client=client: client.delete_object(Bucket="photographs", Key="day/one.jpg"),
            lambda client=client: client.list_objects_v2(Bucket="photographs"),
        ):
            with pytest.raises(ClientError) as caught:
                call()
            assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_only_the_user_can_read_keys_data_and_sockets(bucket: Bucket, folder: Path) -> None:
    others = stat.S_IRWXG | stat.S_IRWXO

    for name in ("keys", "s3", "logs"):
        assert (folder / name).stat().st_mode & others == 0
    keys = sorted((folder / "keys").iterdir())
    assert [path.name for path in keys] == ["certificate.pem", "identities.json", "key.pem", "security.toml"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in keys] == [0o600] * 4
    assert [path for path in sockets(bucket) if path.stat().st_mode & others] == []


def test_a_stopped_server_leaves_no_socket(tmp_path: Path) -> None:
    with run_seaweedfs(tmp_path / "server") as server:
        bucket = Bucket(server, "ready")
        assert [path for path in sockets(bucket) if not path.is_socket()] == []

    assert [path for path in sockets(bucket) if path.exists()] == []
