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


def test_a_kind_of_object_that_does_not_exist_is_a_problem() -> None:
    assert schema_problems({"apiVersion": "ray.io/v1", "kind": "RayJobb", "metadata": {}}) != []
    assert schema_problems({"apiVersion": "batch/v1", "kind": "CronJobb", "metadata": {}}) != []
