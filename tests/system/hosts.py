"""A cluster of several hosts on one machine: each has its own network, processes, /dev/shm and temporary files.

A host is a set of Linux namespaces, connected by a virtual switch. It can lose its power or its network as a machine
does. This needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from commands import CLUSTER_READY_TIMEOUT_S, OBJECT_STORE_MIB, Node, job_environment, wait_until
from servers import NO_PRESTART, nodes_alive, ray_environment

PORT, DASHBOARD_PORT = 6379, 8265
"""Of the first host. Each host has all ports to itself."""
_START = """
hostname "$1"; mount --make-rprivate /
for folder in /dev/shm "$2"; do mount -t tmpfs tmpfs "$folder"; done
shift 2; exec "$@"
"""


def can_make_hosts() -> bool:
    """Return whether this process may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "true"], check=False)
    return done.returncode == 0


@dataclass
class Network:
    """A switch, to which this machine and the hosts are connected."""

    name: str = field(default_factory=lambda: f"agr{secrets.token_hex(3)}")
    subnet: int = field(default_factory=lambda: secrets.randbelow(200) + 20)

    def address(self, number: int) -> str:
        """Return the address of a host; 254 is this machine."""
        return f"10.77.{self.subnet}.{number}"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Make the switch, and connect this machine."""
        _ip("netns", "add", self.name)
        try:
            _ip("-n", self.name, "link", "add", "switch", "type", "bridge")
            _ip("-n", self.name, "link", "set", "switch", "up")
            _ip("link", "add", self.name, "type", "veth", "peer", "name", "port254", "netns", self.name)
            self._connect(254)
            _ip("addr", "add", f"{self.address(254)}/24", "dev", self.name)
            _ip("link", "set", self.name, "up")
            yield
        finally:
            _ip("netns", "del", self.name)  # and both ends of its links with it

    def add_host(self, number: int) -> str:
        """Make the network namespace of a host, and return its name."""
        host = f"{self.name}h{number}"
        _ip("netns", "add", host)
        _ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", f"port{number}", "netns", self.name)
        self._connect(number)
        _ip("-n", host, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", host, "link", "set", link, "up")
        return host

    def _connect(self, number: int) -> None:
        _ip("-n", self.name, "link", "set", f"port{number}", "master", "switch", "up")

    def plug(self, number: int, state: str) -> None:
        """Plug in a host's network cable (`up`), or pull it out (`down`)."""
        _ip("-n", self.name, "link", "set", f"port{number}", state)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Hosts:
    """A running cluster: a node on each host."""

    network: Network
    environment: dict[str, str]
    folder: Path
    """For Ray's files, different ones on each host, and a log of each node."""
    nodes: dict[int, Node] = field(default_factory=dict)
    """By the host's number."""

    @property
    def dashboard(self) -> str:
        return f"http://{self.network.address(1)}:{DASHBOARD_PORT}"

    def add(self, number: int, num_cpus: int) -> None:
        """Start a host and its node, and return once the cluster has it. Host 1 is the head."""
        host, address = self.network.add_host(number), self.network.address(number)
        log = self.folder.with_name(f"{self.folder.name}-{number}.log")
        command = ["ip", "netns", "exec", host, "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        command += ["--mount-proc", "--uts", "sh", "-ec", _START, "sh", host, str(self.folder)]
        command += [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={address}"]
        command += [f"--num-cpus={num_cpus}", f"--object-store-memory={OBJECT_STORE_MIB * 2**20}"]
        if number == 1:
            command += ["--head", f"--port={PORT}", f"--temp-dir={self.folder}", f"--dashboard-host={address}"]
        else:
            command += [f"--address={self.network.address(1)}:{PORT}"]
        with log.open("wb") as file:
            self.nodes[number] = subprocess.Popen(
                command, env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        alive = len(self.nodes)
        wait_until(lambda: self.num_alive() == alive, self.nodes[number], log, CLUSTER_READY_TIMEOUT_S, pause_s=0.3)

    def num_alive(self) -> int | None:
        """Return how many nodes are alive, as the head sees it."""
        return nodes_alive(self.dashboard, self.environment["RAY_AUTH_TOKEN"])

    def cut_power(self, number: int) -> None:
        """End all processes of a host, without a word to the others."""
        self.network.plug(number, "down")
        self._end(number)

    def isolate(self, number: int, seconds: float) -> None:
        """Take a host off the network for some time."""
        self.network.plug(number, "down")
        time.sleep(seconds)
        self.network.plug(number, "up")

    def end(self) -> None:
        """End all hosts."""
        for number in sorted(self.nodes, reverse=True):
            self._end(number)

    def _end(self, number: int) -> None:
        node = self.nodes.pop(number)
        node.kill()  # `unshare`, whose child is the first process of the host and dies with it, and all others then
        node.wait()
        _ip("netns", "del", f"{self.network.name}h{number}")


@contextlib.contextmanager
def run_hosts(network: Network, num_cpus: Mapping[int, int], more: Mapping[str, str]) -> Iterator[Hosts]:
    """Run a cluster of a node on each host, with `more` in their environment; `num_cpus` are logical."""
    folder = Path("/tmp", network.name)  # short, because the paths of Ray's sockets may have 107 bytes
    folder.mkdir()
    environment = job_environment(folder, ray_environment() | NO_PRESTART | dict(more))
    del environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]  # only for several nodes of one host
    hosts = Hosts(network, environment, folder)
    try:
        for number, cpus in num_cpus.items():
            hosts.add(number, cpus)
        yield hosts
    finally:
        hosts.end()
        shutil.rmtree(folder, ignore_errors=True)
        for log in folder.parent.glob(f"{folder.name}-*.log"):
            log.unlink()
