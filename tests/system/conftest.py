"""A real S3 server, started once for all system tests, and a real cluster, started once per file."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from commands import Cluster, run_cluster
from seaweedfs import S3Server, run_seaweedfs
from servers import free_ports

TEST_BUCKET = "tests"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run one SeaweedFS with the bucket `tests` for the session; nothing of it is in the environment."""
    with run_seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        server.client().create_bucket(Bucket=TEST_BUCKET)
        yield server


@pytest.fixture(scope="module")  # a file may run another one, and two crowd a small machine
def cluster(s3_server: S3Server) -> Iterator[Cluster]:
    """Run a cluster that has the keys of the S3 server and is not told where that server is."""
    elsewhere = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}"}
    fewer_processes = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    with run_cluster(s3_server.environment() | elsewhere | fewer_processes) as running:
        yield running


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Point the usual AWS variables at the server, and keep the machine's own AWS configuration out."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent/config")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/credentials")
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_root(s3_environment: S3Server) -> str:
    """Return the URI of an empty prefix that the AWS variables can reach.

    All lie in one bucket: each of SeaweedFS's buckets takes volumes of its own, and a small server has few.
    """
    return f"s3://{TEST_BUCKET}/{uuid.uuid4().hex}"
