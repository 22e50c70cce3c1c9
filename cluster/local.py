"""A Ray cluster of several node processes and an S3 server on this machine, to try jobs before a real cluster.

    cluster/local.sh up 3        start three nodes and an S3 server with the bucket agr-ray
    source cluster/.local/env    make this shell's `ray job`, jobs and AWS tools use them
    cluster/local.sh status      print what is running
    cluster/local.sh down        stop everything; --purge also deletes the bucket's data and the logs

Everything listens on 127.0.0.1 only. Ray requires a token and S3 requires keys; `up` generates both. SeaweedFS's other
ports require a certificate that only you can read. `up` creates these in the folder, and `down` deletes nothing else:

    env      the token, keys and addresses, while the cluster runs
    s3/      the S3 server's data, kept from one `up` to the next
    logs/    output of each process
    keys/    the S3 server's keys and certificate
    ray      a link to Ray's own files and logs, until `down`
    made-by-local-sh.json    a list of these
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import ray  # noqa: F401  # puts its own copy of psutil on the path

# isort: split
import psutil  # type: ignore[import-untyped]
from claims import Claims
from servers import (
    NO_PRESTART,
    S3_FOLDERS,
    Identity,
    S3Server,
    delete_sockets,
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
"""After SIGTERM; then processes are killed. SeaweedFS would take 15 s, with nothing left to write."""
NODE_CPUS: Final = 4
"""Logical CPUs of a node. With fewer, the workers leave none to Ray Data."""
FOREIGN: Final = ("AWS_", "RAY_", "AGR_RAY_")
"""Prefixes of shell variables that are dropped, because they could name another S3 server or other settings."""
UNSET: Final = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL_S3", "RAY_AUTH_TOKEN_PATH")
"""Variables that `env` unsets, because they override or contradict those that it sets."""
MARK: Final = "LOCAL_CLUSTER_FOLDER"
PART: Final = "LOCAL_CLUSTER_PART"
"""In the environment of all processes. By these, not by process ids, `down` finds what to stop, also after a crash."""


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="cluster/local.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--folder", type=Path, default=FOLDER, help=f"where everything is kept ({FOLDER})")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", parents=[common], help="start the nodes and the S3 server")
    up.add_argument("num_nodes", type=positive, nargs="?", default=3, metavar="N", help="number of nodes (3)")
    up.add_argument("--cpus", type=positive, default=NODE_CPUS, help=f"logical CPUs of a node ({NODE_CPUS})")
    up.add_argument("--object-store-mib", type=positive, default=512, help="shared memory of a node, MiB (512)")
    down = commands.add_parser("down", parents=[common], help="stop everything that `up` started")
    down.add_argument("--purge", action="store_true", help="also delete the bucket's data, keys and logs")
    commands.add_parser("status", parents=[common], help="print what is running")
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
    """Parse an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def programs() -> str:
    """Return the folder of this Python, where shells and nodes find `python` and `ray`."""
    return str(Path(sys.executable).parent)


@dataclass(frozen=True)
class LocalCluster:
    """The cluster of one folder."""

    folder: Path

    @property
    def claims(self) -> Claims:
        """Return the record of the files that the cluster made in the folder."""
        return Claims(self.folder)

    def up(self, num_nodes: int, cpus: int, object_store_mib: int) -> None:
        """Start everything; if something fails, stop what was started.

        Raises:
            RuntimeError: the cluster is already running, the folder holds foreign files, another command is using it,
                SeaweedFS is not installed, or a process did not start.
        """
        self.claims.claim()
        with self._alone():
            self._up(num_nodes, cpus, object_store_mib)

    def _up(self, num_nodes: int, cpus: int, object_store_mib: int) -> None:
        if running := self.running():
            raise RuntimeError(f"{', '.join(running)} are running already; stop them with cluster/local.sh down")
        self.forget()  # leftovers of a crash of the machine
        try:
            variables = self._start(num_nodes, cpus, object_store_mib)
            lines = [f"unset {' '.join(UNSET)}", f'export PATH={shlex.quote(programs())}:"$PATH"']
            lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
            self.claims.write("env", "\n".join([*lines, ""]))
        except BaseException:
            if ended := self.stop():
                print(f"stopped {', '.join(ended)} again")
            raise
        env = self.folder / "env"
        print(f"\nDashboard: {variables['RAY_API_SERVER_ADDRESS']}  (asks for RAY_AUTH_TOKEN)\n")
        print(f"  source {shlex.quote(os.path.relpath(env))}")
        print("  ray job submit --working-dir . -- python jobs/train.py --help")

    def _start(self, num_nodes: int, cpus: int, object_store_mib: int) -> dict[str, str]:
        """Start the processes, each once the previous one is ready, and return the variables to reach them with."""
        for name in S3_FOLDERS:
            self.claims.make_folder(name)
        identity = Identity(secrets.token_hex(10), secrets.token_hex(20))
        command, url = seaweedfs_command(self.folder, [identity])
        s3 = S3Server(url, identity.access_key, identity.secret_key)
        self._run("s3", command, {}, lambda: s3.makes_bucket(BUCKET))
        print(f"started an S3 server with the bucket s3://{BUCKET}")

        short = Path(tempfile.mkdtemp(prefix="agr-ray-", dir="/tmp"))
        self.claims.link("ray", short)
        token = ray_environment()
        options, address, dashboard = head_options(short)
        variables = s3.environment() | token
        path = f"{programs()}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        environment = variables | NO_PRESTART | {"PATH": path, "RAY_TMPDIR": str(short)}

        def has_nodes(count: int) -> bool:
            return nodes_alive(dashboard, token["RAY_AUTH_TOKEN"]) == count

        for number in range(num_nodes):
            self._run(
                f"node-{number}",
                node_command(cpus, object_store_mib, options),
                environment,
                partial(has_nodes, number + 1),
            )
            print(f"started node {number + 1} of {num_nodes}")
            options = [f"--address={address}", "--num-gpus=0"]  # the first node has the machine's GPUs
        return variables | {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": dashboard}

    def _run(
        self, part: str, command: Sequence[str], environment: Mapping[str, str], is_ready: Callable[[], bool]
    ) -> None:
        """Start a process that outlives this one, with additional variables, and return once it is ready.

        Raises:
            RuntimeError: it exited, or is not ready in time; the message has the end of its log.
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
                what = f"is not ready after {READY_TIMEOUT_S:g} s" if process.returncode is None else "exited"
                raise RuntimeError(f"{part} {what}; {path} ends with\n{path.read_text(errors='replace')[-2000:]}")
            time.sleep(0.3)

    def down(self, *, purge: bool) -> None:
        """Stop everything that runs. The bucket's data is kept, unless `purge` is set.

        Raises:
            RuntimeError: the folder to purge holds files that `up` did not make, or another command is using it.
        """
        with self._alone():
            stopped = self.stop()
            print(f"stopped {', '.join(stopped)}" if stopped else "nothing is running")
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
        """Print what is running, and the number of live nodes."""
        running = self.running()
        for part, processes in running.items():
            print(f"{part}: {len(processes)} processes, log {self.folder / 'logs' / part}.log")
        env = self.folder / "env"
        if not running or not self.claims.has("env"):
            print("starting, or only partly started" if running else "nothing is running")
            return
        variables = dict(word.split("=", 1) for word in shlex.split(env.read_text()) if "=" in word)
        dashboard = variables["RAY_API_SERVER_ADDRESS"]
        count = nodes_alive(dashboard, variables["RAY_AUTH_TOKEN"])
        print(f"no answer from {dashboard}" if count is None else f"the cluster has {count} live nodes")

    def running(self) -> dict[str, list[psutil.Process]]:
        """Return the running processes of each part: those with this folder's mark, and their descendants."""
        parts: defaultdict[str, dict[int, psutil.Process]] = defaultdict(dict)
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                if environment.get(MARK) == str(self.folder):
                    # Descendants, too, because Ray's workers overwrite their environment with their titles.
                    for each in (process, *process.children(recursive=True)):
                        parts[environment[PART]][each.pid] = each
            except psutil.Error:  # it has exited, or is another user's
                continue
        return {part: list(parts[part].values()) for part in sorted(parts)}

    def stop(self) -> list[str]:
        """Stop all processes, and return the names of their parts.

        Raises:
            RuntimeError: a process can't be stopped.
        """
        stopped = self.running()
        commands = []
        for process in stopped.get("s3", []):
            with suppress(psutil.Error):  # it has exited
                commands.append(process.cmdline())
        for send in (psutil.Process.terminate, psutil.Process.kill):
            processes = [process for part in self.running().values() for process in part]
            for process in processes:
                try:
                    send(process)
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(processes, timeout=END_TIMEOUT_S)
        if left := self.running():
            raise RuntimeError(f"can't stop {left}")
        for command in commands:
            delete_sockets(command)
        self.forget()
        return list(stopped)

    def forget(self) -> None:
        """Delete the files that are useless without the processes."""
        if self.claims.is_claimed():
            for name in ("env", "ray"):
                self.claims.delete(name)


if __name__ == "__main__":
    main()
