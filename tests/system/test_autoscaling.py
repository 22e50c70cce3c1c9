"""A cluster whose head has no CPUs and whose nodes start on demand; and one without an autoscaler."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from commands import Cluster, _start_node, job_environment, kill_group, run_cluster, run_command, short_folder
from servers import NO_PRESTART, head_options, ray_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WORKER_CPUS = 2
SCRIPT = """
import sys, time
import ray
from ray.util import placement_group_table
from agr_ray.config import ClusterConfig
from agr_ray.errors import ConfigError
from agr_ray.runtime.cluster import check_fits, cluster, nodes
from agr_ray.runtime.tune import room
from agr_ray.config import TrainConfig

started = time.monotonic()
with cluster(ClusterConfig(address=sys.argv[1], autoscaler_wait_s=float(sys.argv[3]))):
    try:
        if sys.argv[2] == "sweep":
            print("room for", room(TrainConfig(num_workers=1), None, "tune.max_concurrent").num_trials)
        else:
            check_fits("prepare.num_workers", int(sys.argv[2]), 1.0)
        print("fits", sum(node.get("CPU", 0) for node in nodes()))
    except ConfigError as error:
        print("refused", error)
    print("groups", [group["state"] for group in placement_group_table().values()])
    print("after", time.monotonic() - started)
"""


@contextmanager
def autoscaling_cluster() -> Iterator[Cluster]:
    """Run a head without CPUs, whose autoscaler starts up to two nodes on this machine."""
    with short_folder() as folder:
        options, address, dashboard = head_options(folder)
        lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        worker = {"resources": {"CPU": WORKER_CPUS}, "node_config": {}, "min_workers": 0, "max_workers": 2}
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        config: dict[str, Any] = {f"{name}_commands": [] for name in lists} | {
            "cluster_name": "fake",
            "max_workers": 2,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 5,
            # Not by its own name, under which Ray looks for an example that its wheel lacks.
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": address,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "auth": {},
            "docker": {},
            "cluster_synced_files": [],
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            "head_node_type": "ray.head.default",
            "available_node_types": {"ray.head.default": head, "worker": worker},
        }
        (folder / "autoscaling.json").write_text(json.dumps(config))
        more = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        environment = job_environment(folder, ray_environment() | NO_PRESTART | more)
        cluster = Cluster(address, dashboard, environment, folder, nodes=[])
        try:
            _start_node(cluster, 0, [*options, f"--autoscaling-config={folder}/autoscaling.json"])
            yield cluster
        finally:
            for node in cluster.nodes:
                kill_group(node)


def tried(cluster: Cluster, asked: object, wait_s: float) -> str:
    """Return the output of a job that requests so many processes."""
    command = [sys.executable, "-c", SCRIPT, cluster.address, str(asked), str(wait_s)]
    done = run_command(command, cluster.environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_jobs_wait_for_nodes_and_are_rejected_if_none_arrive() -> None:
    with autoscaling_cluster() as cluster:
        at_once = tried(cluster, 1, 0.0)
        assert "refused prepare.num_workers asks for 1 x 1 CPU and 1 for reading and writing, 2 in all" in at_once
        assert "waiting for the autoscaler" not in at_once

        came = tried(cluster, 3, 240.0)
        assert came.count("waiting for the autoscaler to add nodes for prepare.num_workers: 4 CPU; 240 s at most") == 1
        assert f"fits {2.0 * WORKER_CPUS}" in came
        assert "groups ['REMOVED']" in came

        assert "room for" in tried(cluster, "sweep", 240.0)

        never = tried(cluster, 9, 5.0)
        assert "refused prepare.num_workers asks for 9 x 1 CPU" in never
        assert "Its autoscaler added too few nodes within 5 s" in never
        assert never.count("'REMOVED'") == never.count("groups [") * 2


def test_a_cluster_without_an_autoscaler_is_rejected_at_once() -> None:
    with run_cluster(num_cpus=(1,)) as cluster:
        said = tried(cluster, 3, 240.0)

    assert "refused prepare.num_workers asks for 3 x 1 CPU" in said
    assert "waiting for the autoscaler" not in said
    assert "groups []" in said
