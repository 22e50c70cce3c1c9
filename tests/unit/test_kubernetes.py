"""The manifests of cluster/kuberay, as Kustomize builds them, without a cluster.

Every object is checked against its strict schema, KubeRay's own rules and the objects that it names; every command by
the command line's own parser. A typo in any file, and in any field of an object, is caught.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kustomize import Document, build
from manifest_checks import problems, schema_problems, validator

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
OVERLAYS = ("kind", "aws", "gcp", "all components")
JOBS = ("prepare", "train", "tune", "compare", "score", "report")
FREE = {"labels", "annotations", "data", "nodeSelector", "rayStartParams", "requests", "limits", "matchLabels"}
"""Mappings with keys of our own choice."""


def overlay(name: str, folder: Path, kuberay: Path = KUBERAY) -> Path:
    """Return the folder of an overlay. `all components` is a copy of `aws` with every component."""
    if name != "all components":
        return kuberay / "overlays" / name
    shutil.copytree(kuberay, folder / "copy")
    path = folder / "copy" / "overlays" / "aws"
    with (path / "kustomization.yaml").open("a") as file:
        file.write("components: [../../components/kueue, ../../components/network-policy]\n")
    return path


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_has_no_problems(name: str, tmp_path: Path) -> None:
    documents = build(overlay(name, tmp_path))

    assert problems(documents) == []
    assert [each["metadata"]["name"] for each in documents if each["kind"] == "RayJob"] == list(JOBS)
    assert {each["kind"] for each in documents} >= {"CronJob", "RayCronJob", "NetworkPolicy", "Namespace", "Role"}
    assert not [each for each in documents if each["kind"] == "Secret"]
    assert not [each for each in documents if "agr-ray" not in each["metadata"]["labels"]]  # `kubectl -l` finds it


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", OVERLAYS)
def test_our_reader_builds_what_kubectl_builds(name: str, tmp_path: Path) -> None:
    folder = overlay(name, tmp_path)
    shown = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True).stdout

    def by_name(documents: Iterator[Document] | list[Document]) -> dict[tuple[str, str], Document]:
        return {(each["kind"], each["metadata"]["name"]): each for each in documents}

    assert by_name(build(folder)) == by_name(yaml.load_all(shown, yaml.CSafeLoader))


def test_the_nightly_template_is_the_score_job(tmp_path: Path) -> None:
    for name in OVERLAYS:
        documents = {(each["kind"], each["metadata"]["name"]): each for each in build(overlay(name, tmp_path))}
        assert documents["RayCronJob", "score-nightly"]["spec"]["jobTemplate"] == documents["RayJob", "score"]["spec"]
        assert documents["RayCronJob", "score-nightly"]["spec"]["suspend"] is True
        assert documents["CronJob", "score-nightly"]["spec"]["concurrencyPolicy"] == "Forbid"


def test_the_version_of_ray_is_the_locked_one() -> None:
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    for document in build(KUBERAY / "overlays" / "aws"):
        if document["kind"] == "RayJob":
            assert document["spec"]["rayClusterSpec"]["rayVersion"] == locked[1]


def test_a_kueue_job_has_a_queue_a_fixed_size_and_an_end(tmp_path: Path) -> None:
    jobs = [each for each in build(overlay("all components", tmp_path)) if each["kind"] == "RayJob"]

    for job in jobs:
        cluster = job["spec"]["rayClusterSpec"]
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "agr-ray"
        assert job["spec"]["shutdownAfterJobFinishes"] is True
        assert cluster["enableInTreeAutoscaling"] is False
        assert [group["replicas"] for group in cluster["workerGroupSpecs"]] == [3, 4]
        assert all(group["replicas"] <= group["maxReplicas"] for group in cluster["workerGroupSpecs"])


# Typos


def paths(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every field whose name is not of our own choice."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield (*path, key)
            if key not in FREE:
                yield from paths(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from paths(value, (*path, index))


def with_typo(document: Document, path: tuple[str | int, ...]) -> Document:
    """Return a copy of the document with one field's name misspelled."""
    changed = json.loads(json.dumps(document))
    place = changed
    for part in path[:-1]:
        place = place[part]
    place[f"{path[-1]}x"] = place.pop(path[-1])
    return changed


def test_a_typo_in_any_field_of_any_object_is_caught(tmp_path: Path) -> None:
    documents = build(overlay("all components", tmp_path)) + build(KUBERAY / "overlays" / "kind")
    checked, missed = 0, []
    # The RayCronJob has all fields of the RayJobs.
    for document in {json.dumps(each): each for each in documents if each["kind"] != "RayJob"}.values():
        for path in paths(document):
            if path[0] in ("apiVersion", "kind") or (document["kind"], path[-1]) == ("Service", "app"):
                continue
            checked += 1
            if validator(document["kind"], document["apiVersion"]).is_valid(with_typo(document, path)):
                missed.append((document["kind"], *path))

    assert missed == []
    assert checked > 500


TYPOS = [
    ("base/accounts.yaml", "kind: Role, name: ray-head", "kind: Role, name: ray-heed"),
    ("base/cluster.yaml", "maxReplicas", "maxReplica"),
    ("base/cluster.yaml", "serviceAccountName: ray-worker", "serviceAccountName: ray-workers"),
    ("base/cluster.yaml", "mode: token", "mode: tokens"),
    ("base/cluster.yaml", "sizeLimit: 9Gi", "sizelimit: 9Gi"),
    ("base/cluster.yaml", 'limits: {cpu: "7"', 'limits: {cpu: "8"'),
    ("base/jobs.yaml", "--num_workers $TRAINERS", "--num_worker $TRAINERS"),
    ("base/jobs.yaml", "--train.use_gpu", "--use_gpu"),
    ("base/jobs.yaml", "--config compare_lite", "--config compare_light"),
    ("base/jobs.yaml", "agr-ray report", "agr-ray reports"),
    ("base/kustomization.yaml", "configMapGenerator", "configMapGenerators"),
    ("base/namespace.yaml", "labels", "label"),
    ("base/network.yaml", "policyTypes: [Ingress", "policyTypes: [Ingres"),
    ("base/network.yaml", "podSelector: {}\n  policyTypes", "podSelektor: {}\n  policyTypes"),
    ("base/nightly.yaml", "concurrencyPolicy: Forbid", "concurrencyPolicy: Forbidden"),
    ("base/nightly.yaml", "nightly.py, score-nightly", "nightly.py, score-nightli"),
    ("base/nightly.yaml", "jobTemplate: {}", "jobTemplates: {}"),
    ("base/settings.yaml", "DECODERS", "DECODER"),
    ("base/settings.yaml", "TRAINERS: 1-4", "TRAINERS: 1 to 4"),
    ("components/kueue/fixed-size.yaml", "spec/ttlSecondsAfterFinished", "spec/ttlSecondsAfterFinish"),
    ("components/kueue/kustomization.yaml", "target", "targets"),
    ("components/kueue/queue.yaml", "metadata/labels", "metadata/label"),
    ("components/network-policy/deny.yaml", "DenyAllIngress", "DenyIngress"),
    ("components/network-policy/kustomization.yaml", "RayJob", "RayJobs"),
    ("overlays/aws/identity.yaml", "metadata/annotations", "metadata/annotation"),
    ("overlays/aws/kustomization.yaml", "name: ray-.*", "name: roy-.*"),
    ("overlays/aws/settings.yaml", "name: agr-ray\n", "name: agr_ray\n"),
    (
        "overlays/aws/spot.yaml",
        "workerGroupSpecs/1/template/spec/nodeSelector",
        "workerGroupSpecs/1/template/spec/nodeSelect",
    ),
    ("overlays/gcp/identity.yaml", "audience", "audienc"),
    ("overlays/gcp/kustomization.yaml", "spec.jobTemplate", "spec.jobTemplates"),
    ("overlays/gcp/settings.yaml", "data:", "date:"),
    ("overlays/gcp/spot.yaml", "operator: Equal", "operator: Equals"),
    ("overlays/kind/kustomization.yaml", "newName", "newNames"),
    ("overlays/kind/s3.yaml", "readinessProbe", "readynessProbe"),
    ("overlays/kind/settings.yaml", 'USE_GPU: "false"', 'USE_GPU: "nope"'),
    ("overlays/kind/small.yaml", "volumes/0/emptyDir/sizeLimit", "volumes/0/emptyDir/sizeLimits"),
]


def test_there_is_a_typo_for_each_file() -> None:
    files = {str(path.relative_to(KUBERAY)) for path in KUBERAY.rglob("*.yaml")}
    assert {file for file, _, _ in TYPOS} == files


@pytest.mark.parametrize(("file", "right", "wrong"), TYPOS, ids=lambda each: each[:30])
def test_a_planted_typo_is_caught(file: str, right: str, wrong: str, tmp_path: Path) -> None:
    kuberay = tmp_path / "kuberay"
    shutil.copytree(KUBERAY, kuberay)
    text = (kuberay / file).read_text()
    assert right in text
    (kuberay / file).write_text(text.replace(right, wrong, 1))
    is_of_overlay = file.startswith("overlays/")
    name = file.split("/")[1] if is_of_overlay else "all components"

    try:
        found = problems(build(overlay(name, tmp_path, kuberay)))
    except (ValueError, KeyError, IndexError) as error:
        found = [repr(error)]

    assert found != []


def test_a_kind_of_object_that_does_not_exist_is_a_problem() -> None:
    assert schema_problems({"apiVersion": "ray.io/v1", "kind": "RayJobb", "metadata": {}}) != []
    assert schema_problems({"apiVersion": "batch/v1", "kind": "CronJobb", "metadata": {}}) != []
