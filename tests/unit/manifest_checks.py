"""Checks of Kubernetes objects without a cluster. Each returns what is wrong, one line each."""

from __future__ import annotations

import importlib.resources
import json
import re
import shlex
import string
from collections.abc import Iterator
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from kuberay_schemas import kuberay_schemas
from kustomize import Document
from referencing import Registry, Resource

from agr_ray.cli import COMMANDS
from agr_ray.config import parse
from agr_ray.errors import ConfigError

_CORE = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / "v1.35.0-local-strict"
_META = "https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
_MADE_BY_HAND = {("Secret", "agr-ray-s3")}
"""Objects that manifests name and that docs/kubernetes.md creates."""
_VALUES = {
    "action": {"FailJob", "Ignore", "Count", "FailIndex"},
    "concurrencyPolicy": {"Allow", "Forbid", "Replace"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "medium": {"", "Memory"},
    "operator": {"Equal", "Exists", "In"},
    "policyTypes": {"Ingress", "Egress"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "verbs": {"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"},
}
"""Values of fields that the schemas leave open."""
_LONGEST_RAYJOB = 47
_CRONJOB_SUFFIX = len("-12345678")


def problems(documents: list[Document]) -> list[str]:
    """Return everything that is wrong with the objects of an overlay."""
    named = {(each["kind"], each["metadata"]["name"]): each for each in documents}
    found = [] if len(named) == len(documents) else ["two objects have the same name"]
    for (kind, name), document in named.items():
        each = [*schema_problems(document), *pod_problems(document)]
        each += [f"there is no {of} {what}" for of, what in sorted(references(document) - _MADE_BY_HAND - named.keys())]
        if kind in ("RayJob", "RayCronJob"):
            spec = document["spec"]["jobTemplate"] if kind == "RayCronJob" else document["spec"]
            settings = named["ConfigMap", "agr-ray"]["data"]
            each += [*rayjob_problems(name, spec), *command_problems(spec.get("entrypoint", ""), settings)]
        found += [f"{kind} {name}: {problem}" for problem in each]
    return found


@cache
def validator(kind: str, api_version: str) -> Draft202012Validator:
    """Return the validator of a kind of object, which rejects unknown fields."""
    if api_version == "ray.io/v1":
        schema = kuberay_schemas()[kind]
        schema["properties"]["metadata"] = {"$ref": _META}
    else:
        group = re.sub(r"^([^./]*)[^/]*/", r"\1-", api_version)
        schema = json.loads((_CORE / f"{kind.lower()}-{group}.json").read_text())
    return Draft202012Validator(schema, registry=_definitions())


@cache
def _definitions() -> Registry[Any]:
    return Resource.from_contents(json.loads((_CORE / "_definitions.json").read_text())) @ Registry()


def schema_problems(document: Document) -> list[str]:
    """Check an object against the schema of its kind."""
    try:
        errors = validator(document["kind"], document["apiVersion"]).iter_errors(document)
    except (FileNotFoundError, KeyError):
        return ["there is no such kind of object"]
    found = [f"{error.json_path}: {error.message[:200]}" for error in errors]
    for node in nodes(document):
        for field in node.keys() & _VALUES:
            values = node[field] if isinstance(node[field], list) else [node[field]]
            found += [f"{field}: {value} is not allowed" for value in values if value not in _VALUES[field]]
    return found


def nodes(node: Any) -> Iterator[Document]:
    """Yield every mapping in a document."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from nodes(value)
    elif isinstance(node, list):
        for each in node:
            yield from nodes(each)


def pod_problems(document: Document) -> list[str]:
    """Check that every pod runs without privileges, and that every container is guaranteed what it may use."""
    found = []
    for pod in (node for node in nodes(document) if "containers" in node):
        security = pod.get("securityContext", {})
        if security.get("runAsNonRoot") is not True or security.get("seccompProfile") != {"type": "RuntimeDefault"}:
            found.append("a pod may run as root, or without a seccomp profile")
        for container in pod["containers"]:
            name, resources = container["name"], container.get("resources", {})
            limits, security = resources.get("limits"), container.get("securityContext", {})
            may_gain, drops = security.get("allowPrivilegeEscalation"), security.get("capabilities")
            if limits is None or limits != resources.get("requests"):
                found.append(f"container {name}: requests differ from limits")
            if may_gain is not False or drops != {"drop": ["ALL"]}:
                found.append(f"container {name} has privileges")
            if ":" not in container["image"]:
                found.append(f"container {name}: the image has no tag")
    return found


def references(document: Document) -> set[tuple[str, str]]:
    """Return the kind and name of the objects that an object needs."""
    found = set()
    for node in nodes(document):
        for field, kind in (("configMap", "ConfigMap"), ("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if field in node:
                found.add((kind, node[field].get("name", "")))
        if "serviceAccountName" in node:
            found.add(("ServiceAccount", node["serviceAccountName"]))
        if "verbs" in node:
            found |= {("RayCronJob", name) for name in node.get("resourceNames", ())}
        if "/script/nightly.py" in node.get("command", ()):
            found.add(("RayCronJob", node["command"][-1]))
    if document["kind"] == "RoleBinding":
        found |= {(each["kind"], each["name"]) for each in [document["roleRef"], *document["subjects"]]}
    return found


def rayjob_problems(name: str, spec: Document) -> list[str]:
    """Check what KubeRay v1.7 and Kueue check only once a RayJob exists."""
    cluster, shuts_down = spec.get("rayClusterSpec", {}), spec.get("shutdownAfterJobFinishes", False)
    strategy = spec.get("deletionStrategy", {})
    rules = [
        ("the name is too long", len(name) + _CRONJOB_SUFFIX > _LONGEST_RAYJOB),
        (
            "ttlSecondsAfterFinished needs shutdownAfterJobFinishes",
            "ttlSecondsAfterFinished" in spec and not shuts_down,
        ),
        ("deletionRules exclude shutdownAfterJobFinishes", "deletionRules" in strategy and shuts_down),
        ("the Ray cluster is never deleted", "deletionRules" not in strategy and not shuts_down),
        ("token authentication is off", cluster.get("authOptions", {}).get("mode") != "token"),
        ("backoffLimit is missing", "backoffLimit" not in spec),
    ]
    for rule in strategy.get("deletionRules", ()):
        states = rule["condition"].keys() & {"jobStatus", "jobDeploymentStatus"}
        rules.append(("a deletion rule needs one status", len(states) != 1))
    for group in [cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", ())]:
        pod = group.get("template", {}).get("spec", {"containers": [{}]})
        shared = [volume["emptyDir"] for volume in pod.get("volumes", ()) if volume["name"] == "shared-memory"]
        mounts = [mount["mountPath"] for mount in pod["containers"][0].get("volumeMounts", ())]
        is_sized = [each.get("medium") == "Memory" and "sizeLimit" in each for each in shared] == [True]
        rules.append(("/dev/shm has no size", not is_sized or "/dev/shm" not in mounts))
    return [message for message, is_broken in rules if is_broken]


def command_problems(entrypoint: str, settings: Document) -> list[str]:
    """Check a command with the command line's own parser, after the shell has replaced $NAME."""
    try:
        program, command, *options = shlex.split(string.Template(entrypoint).substitute(settings))
        if program != "agr-ray" or command not in COMMANDS:
            return [f"{entrypoint}: not a command of agr-ray"]
        parse(COMMANDS[command].job, options, {})
    except (KeyError, ValueError, ConfigError) as error:
        return [f"{entrypoint}: {error!r}"]
    except SystemExit:
        return [f"{entrypoint}: there is no such option"]
    if re.search(r"""["'\\;&|<>()*?!`#~]""", entrypoint.replace("$", "")):
        return [f"{entrypoint}: a shell would change it"]
    return []
