"""A Ray cluster of several node processes and an S3 server on this machine, to try what is meant for a real one.

    cluster/local.sh up 3        start three nodes and an S3 server with the bucket agr-ray
    source cluster/.local/env    point this shell's `ray job`, jobs and AWS tools at them
    cluster/local.sh status      say what of it runs
    cluster/local.sh down        end what `up` started; --purge deletes the bucket's data and the logs too

Everything listens on 127.0.0.1 only. Ray requires a token and S3 requires keys; `up` generates both. SeaweedFS's other
ports require a certificate that only you can read. `up` makes these in the folder, and `down` deletes nothing else:

    env      the token, keys and addresses, while the cluster runs
    s3/      the S3 server's data, which stay from one `up` to the next
    logs/    what each process wrote
    keys/    the S3 server's keys and certificate
    ray      a link to Ray's own files, with its logs, until `down`
    made-by-local-sh.json    the list of these
"""

from __future__ import annotations

import argparse
import fcntl
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import ray  # noqa: F401  # brings psutil, of which it carries a copy

# isort: split
import psutil  # type: ignore[import-untyped]
from claims import Claims
from servers import (
    S3_FOLDERS,
    Identity,
    S3Server,
    head_options,
    node_command,
    nodes_alive,
    ray_environment,
    seaweedfs_command,
)

FOLDER: Final = Path(__file__).resolve().parent / ".local"
BUCKET: Final = "agr-ray"
READY_TIMEOUT_S: Final = 120.0
END_TIMEOUT_S: Final = 5.0
"""Of those who are asked; then they are killed. SeaweedFS would take 15 s, with nothing left to write."""
NODE_CPUS: Final = 4
"""Logical: fewer leave Ray Data none beside the workers."""
FOREIGN: Final = ("AWS_", "RAY_", "AGR_RAY_")
"""Variables of the shell that begin so are dropped: nodes and jobs would meet another S3 server, or other settings."""
UNSET: Final = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL_S3", "RAY_AUTH_TOKEN_PATH")
"""Would win over what `env` sets, or confuse it."""
MARK: Final = "LOCAL_CLUSTER_FOLDER"
PART: Final = "LOCAL_CLUSTER_PART"
"""In the environment of all that runs: by them, and not by noted ids, `down` knows what to end, also after a crash."""


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        prog="cluster/local.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--folder", type=Path, default=FOLDER, help=f"where everything is kept ({FOLDER})")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", parents=[common], help="start nodes and the S3 server")
    up.add_argument("num_nodes", type=positive, nargs="?", default=3, metavar="N", help="how many nodes (3)")
    up.add_argument("--cpus", type=positive, default=NODE_CPUS, help=f"logical CPUs of a node ({NODE_CPUS})")
    up.add_argument("--object-store-mib", type=positive, default=512, help="shared memory of a node, MiB (512)")
    down = commands.add_parser("down", parents=[common], help="end what `up` started")
    down.add_argument("--purge", action="store_true", help="delete the bucket's data, keys and logs too")
    commands.add_parser("status", parents=[common], help="say what runs")
    arguments = parser.parse_args()

    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    local = LocalCluster(arguments.folder.resolve())
    try:
        if arguments.command == "up":
            local.up(arguments.num_nodes, arguments.cpus, arguments.object_store_mib)
        elif arguments.command == "down":
            local.down(purge=arguments.purge)
        else:
            local.status()
    except (RuntimeError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None


def positive(text: str) -> int:
    """Read a whole number from 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def programs() -> str:
    """Return the folder of this Python, in which a shell and the nodes find `python` and `ray`."""
    return str(Path(sys.executable).parent)


@dataclass(frozen=True)
class LocalCluster:
    """What runs out of one folder."""

    folder: Path

    @property
    def claims(self) -> Claims:
        """Return the record of the files that the cluster made in the folder."""
        return Claims(self.folder)

    def up(self, num_nodes: int, cpus: int, object_store_mib: int) -> None:
        """Start everything, or nothing: what had been started when something failed is ended again.

        Raises:
            RuntimeError: the cluster is already running, the folder holds foreign files, another command is using it,
                SeaweedFS is not installed, or a process did not start.
        """
        self.claims.claim()
        with self._alone():
            self._up(num_nodes, cpus, object_store_mib)

    def _up(self, num_nodes: int, cpus: int, object_store_mib: int) -> None:
        if running := self.running():
            raise RuntimeError(f"{', '.join(running)} run already: cluster/local.sh down ends them")
        self.forget()  # what a machine that went down left
        try:
            variables = self._start(num_nodes, cpus, object_store_mib)
            lines = [f"unset {' '.join(UNSET)}", f'export PATH={shlex.quote(programs())}:"$PATH"']
            lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
            self.claims.write("env", "\n".join([*lines, ""]))
        except BaseException:
            if ended := self.end():
                print(f"ended {', '.join(ended)} again")
            raise
        env = self.folder / "env"
        print(f"\nDashboard: {variables['RAY_API_SERVER_ADDRESS']}  (it asks for RAY_AUTH_TOKEN)\n")
        print(f"  source {shlex.quote(os.path.relpath(env))}")
        print("  ray job submit --working-dir . -- python jobs/train.py --help")

    def _start(self, num_nodes: int, cpus: int, object_store_mib: int) -> dict[str, str]:
        """Start the processes, each when the one before is ready, and return the variables that reach them."""
        for name in S3_FOLDERS:
            self.claims.make_folder(name)
        identity = Identity(secrets.token_hex(10), secrets.token_hex(20))
        command, url = seaweedfs_command(self.folder, [identity])
        s3 = S3Server(url, identity.access_key, identity.secret_key)
        self._run("s3", command, {}, lambda: s3.makes_bucket(BUCKET))
        print(f"an S3 server runs, with the bucket s3://{BUCKET}")

        short = Path(tempfile.mkdtemp(prefix="agr-ray-", dir="/tmp"))
        self.claims.link("ray", short)
        token = ray_environment()
        options, address, dashboard = head_options(short)
        variables = s3.environment() | token
        environment = variables | {
            "PATH": f"{programs()}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "RAY_TMPDIR": str(short),
            # A process for each CPU, started before there is work, would keep a small machine busy for half a minute.
            "RAY_prestart_worker_first_driver": "0",
        }

        def has_nodes(count: int) -> bool:
            return nodes_alive(dashboard, token["RAY_AUTH_TOKEN"]) == count

        for number in range(num_nodes):
            self._run(
                f"node-{number}",
                node_command(cpus, object_store_mib, options),
                environment,
                partial(has_nodes, number + 1),
            )
            print(f"node {number + 1} of {num_nodes} runs")
            options = [f"--address={address}", "--num-gpus=0"]  # the first has the machine's GPUs
        return variables | {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": dashboard}

    def _run(
        self, part: str, command: Sequence[str], environment: Mapping[str, str], is_ready: Callable[[], bool]
    ) -> None:
        """Start a process that outlives this one, with more in its environment, and return once it is ready.

        Raises:
            RuntimeError: it ended, or is not ready in time; with the end of its log.
        """
        path = self.folder / "logs" / f"{part}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, **environment, MARK: str(self.folder), PART: part},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                what = f"took over {READY_TIMEOUT_S:g} s" if process.returncode is None else "ended"
                raise RuntimeError(f"{part} {what}; {path} ends with\n{path.read_text(errors='replace')[-2000:]}")
            time.sleep(0.3)

    def down(self, *, purge: bool) -> None:
        """Stop everything that runs. The bucket's data is kept, unless `purge` is set.

        Raises:
            RuntimeError: the folder to purge holds files that `up` did not make, or another command is using it.
        """
        with self._alone():
            ended = self.end()
            print(f"ended {', '.join(ended)}" if ended else "nothing runs")
            if purge:
                self._purge()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the folder, if it exists, against other commands until the block or this process ends."""
        with ExitStack() as stack:
            if self.folder.exists():
                descriptor = os.open(self.folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RuntimeError(f"{self.folder}: another `up` or `down` is running there") from None
            yield

    def _purge(self) -> None:
        if not self.claims.is_claimed():
            if not self.folder.exists() or not any(self.folder.iterdir()):
                print(f"{self.folder} is empty")
                return
            raise RuntimeError(f"{self.folder}: `up` did not make its contents; nothing is deleted")
        left = [str(self.folder / name) for name in S3_FOLDERS if not self.claims.delete(name)]
        self.claims.release()
        print(f"deleted the data, keys and logs in {self.folder}")
        if left:
            raise RuntimeError(f"`up` did not make {', '.join(left)}; it is left alone")

    def status(self) -> None:
        """Print what runs, and how many nodes the cluster counts."""
        running = self.running()
        for part, processes in running.items():
            print(f"{part}: {len(processes)} processes, log {self.folder / 'logs' / part}.log")
        env = self.folder / "env"
        if not running or not self.claims.has("env"):
            print("it is being started, or was not started whole" if running else "nothing runs")
            return
        variables = dict(word.split("=", 1) for word in shlex.split(env.read_text()) if "=" in word)
        dashboard = variables["RAY_API_SERVER_ADDRESS"]
        count = nodes_alive(dashboard, variables["RAY_AUTH_TOKEN"])
        print(f"no answer from {dashboard}" if count is None else f"the cluster counts {count} nodes alive")

    def running(self) -> dict[str, list[psutil.Process]]:
        """Return the processes of each part that runs: those marked as this folder's, and their descendants."""
        found: defaultdict[str, dict[int, psutil.Process]] = defaultdict(dict)
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                if environment.get(MARK) == str(self.folder):
                    # Ray's workers overwrite theirs with their titles.
                    for each in (process, *process.children(recursive=True)):
                        found[environment[PART]][each.pid] = each
            except psutil.Error:  # it has ended, or is another user's
                continue
        return {part: list(found[part].values()) for part in sorted(found)}

    def end(self) -> list[str]:
        """End all that runs, and return the names of its parts.

        Raises:
            RuntimeError: something can't be ended.
        """
        ended = self.running()
        for send in (psutil.Process.terminate, psutil.Process.kill):
            processes = [process for part in self.running().values() for process in part]
            for process in processes:
                try:
                    send(process)
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(processes, timeout=END_TIMEOUT_S)
        if left := self.running():
            raise RuntimeError(f"can't end {left}")
        self.forget()
        return list(ended)

    def forget(self) -> None:
        """Remove what is of no use without the processes."""
        if self.claims.is_claimed():
            for name in ("env", "ray"):
                self.claims.delete(name)


if __name__ == "__main__":
    main()
