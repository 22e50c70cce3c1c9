"""A planted typo in any file of Kubernetes, `ray up` or SkyPilot is caught by the checks of the files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from kustomize import build
from manifest_checks import problems
from test_cloud_clusters import MISTAKES, check
from test_kubernetes import overlay

CLUSTER = Path(__file__).parents[2] / "cluster"
FOLDERS = ("kuberay", "ray-up", "skypilot")
TYPOS = [
    ("kuberay/base/accounts.yaml", "kind: Role, name: ray-head", "kind: Role, name: ray-heed"),
    ("kuberay/base/cluster.yaml", "maxReplicas", "maxReplica"),
    ("kuberay/base/cluster.yaml", "serviceAccountName: ray-worker", "serviceAccountName: ray-workers"),
    ("kuberay/base/cluster.yaml", "mode: token", "mode: tokens"),
    ("kuberay/base/cluster.yaml", "sizeLimit: 9Gi", "sizelimit: 9Gi"),
    ("kuberay/base/cluster.yaml", 'limits: {cpu: "7"', 'limits: {cpu: "8"'),
    ("kuberay/base/jobs.yaml", "--num_workers $TRAINERS", "--num_worker $TRAINERS"),
    ("kuberay/base/jobs.yaml", "--train.use_gpu", "--use_gpu"),
    ("kuberay/base/jobs.yaml", "--config compare_lite", "--config compare_light"),
    ("kuberay/base/jobs.yaml", "agr-ray report", "agr-ray reports"),
    ("kuberay/base/kustomization.yaml", "configMapGenerator", "configMapGenerators"),
    ("kuberay/base/namespace.yaml", "labels", "label"),
    ("kuberay/base/network.yaml", "policyTypes: [Ingress", "policyTypes: [Ingres"),
    ("kuberay/base/network.yaml", "podSelector: {}\n  policyTypes", "podSelektor: {}\n  policyTypes"),
    ("kuberay/base/nightly.yaml", "concurrencyPolicy: Forbid", "concurrencyPolicy: Forbidden"),
    ("kuberay/base/nightly.yaml", "nightly.py, score-nightly", "nightly.py, score-nightli"),
    ("kuberay/base/nightly.yaml", "jobTemplate: {}", "jobTemplates: {}"),
    ("kuberay/base/settings.yaml", "DECODERS", "DECODER"),
    ("kuberay/base/settings.yaml", "TRAINERS: 1-4", "TRAINERS: 1 to 4"),
    ("kuberay/components/kueue/fixed-size.yaml", "spec/ttlSecondsAfterFinished", "spec/ttlSecondsAfterFinish"),
    ("kuberay/components/kueue/kustomization.yaml", "target", "targets"),
    ("kuberay/components/kueue/queue.yaml", "metadata/labels", "metadata/label"),
    ("kuberay/components/network-policy/deny.yaml", "DenyAllIngress", "DenyIngress"),
    ("kuberay/components/network-policy/kustomization.yaml", "RayJob", "RayJobs"),
    ("kuberay/overlays/aws/identity.yaml", "metadata/annotations", "metadata/annotation"),
    ("kuberay/overlays/aws/kustomization.yaml", "name: ray-.*", "name: roy-.*"),
    ("kuberay/overlays/aws/settings.yaml", "name: agr-ray\n", "name: agr_ray\n"),
    (
        "kuberay/overlays/aws/spot.yaml",
        "workerGroupSpecs/1/template/spec/nodeSelector",
        "workerGroupSpecs/1/template/spec/nodeSelect",
    ),
    ("kuberay/overlays/gcp/identity.yaml", "audience", "audienc"),
    ("kuberay/overlays/gcp/kustomization.yaml", "spec.jobTemplate", "spec.jobTemplates"),
    ("kuberay/overlays/gcp/settings.yaml", "data:", "date:"),
    ("kuberay/overlays/gcp/spot.yaml", "operator: Equal", "operator: Equals"),
    ("kuberay/overlays/kind/kustomization.yaml", "newName", "newNames"),
    ("kuberay/overlays/kind/s3.yaml", "readinessProbe", "readynessProbe"),
    ("kuberay/overlays/kind/settings.yaml", 'USE_GPU: "false"', 'USE_GPU: "nope"'),
    ("kuberay/overlays/kind/small.yaml", "volumes/0/emptyDir/sizeLimit", "volumes/0/emptyDir/sizeLimits"),
    ("ray-up/aws.yaml", "head_node_type: head", "head_node_type: heed"),
    ("ray-up/aws.yaml", "idle_timeout_minutes", "idle_timeout_minute"),
    ("ray-up/aws.yaml", "min_workers", "minworkers"),
    ("ray-up/aws.yaml", "HttpTokens", "HttpToken"),
    ("ray-up/aws.yaml", "cache_stopped_nodes", "cache_stoped_nodes"),
    ("ray-up/aws.yaml", "cluster/docker/installer.lock", "cluster/docker/installers.lock"),
    ("ray-up/aws.yaml", "--dashboard-host", "--dashboards-host"),
    ("ray-up/gcp.yaml", "instanceTerminationAction", "instanceTerminateAction"),
    ("ray-up/gcp.yaml", "file_mounts", "file_mount"),
    ("ray-up/gcp.yaml", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=tokens"),
    ("skypilot/train.yaml", "use_spot", "use_spots"),
    ("skypilot/train.yaml", "--precision auto", "--precison auto"),
    ("skypilot/train.yaml", "--config paper", "--config papers"),
    ("skypilot/train.yaml", "$RESULTS/prepared", "$RESULT/prepared"),
    ("skypilot/train.yaml", "    exit 0\n  fi", "    exit 0"),
]


def found_in(cluster: Path, file: str, folder: Path) -> list[str]:
    """Return what the checks find in a file of `cluster`; `folder` is for temporary files."""
    kind, *parts = file.split("/")
    try:
        if kind != "kuberay":
            check(cluster / file)
            return []
        name = parts[1] if parts[0] == "overlays" else "all components"
        return problems(build(overlay(name, folder, cluster / kind)))
    except (*MISTAKES, IndexError) as error:
        return [repr(error)]


def test_there_is_a_typo_for_each_file() -> None:
    files = {str(path.relative_to(CLUSTER)) for folder in FOLDERS for path in (CLUSTER / folder).rglob("*.yaml")}
    assert {file for file, _, _ in TYPOS} == files


@pytest.mark.parametrize(("file", "right", "wrong"), TYPOS, ids=lambda each: each[:40])
def test_a_planted_typo_is_caught(file: str, right: str, wrong: str, tmp_path: Path) -> None:
    for folder in FOLDERS:
        shutil.copytree(CLUSTER / folder, tmp_path / "cluster" / folder)
    path = tmp_path / "cluster" / file
    text = path.read_text()
    assert right in text
    assert found_in(tmp_path / "cluster", file, tmp_path / "before") == []

    path.write_text(text.replace(right, wrong))

    assert found_in(tmp_path / "cluster", file, tmp_path / "after") != []
