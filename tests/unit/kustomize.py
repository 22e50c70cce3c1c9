"""Kustomize, as far as cluster/kuberay uses it: what `kubectl kustomize` prints, without kubectl.

It knows resources, components, configMapGenerator (files), patches (JSON 6902, and merges of mappings), namespace,
images and replacements of whole values, in Kustomize's order. It rejects everything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
FIELDS = {
    *("apiVersion", "kind", "resources", "configMapGenerator", "components"),
    *("patches", "namespace", "images", "replacements"),
}


def build(folder: Path) -> list[Document]:
    """Return the objects of a kustomization."""
    return _applied(folder, [])


def load_all(path: Path) -> list[Any]:
    """Return the documents of a YAML file. Aliases are copies, as in Kustomize."""
    return [json.loads(json.dumps(document)) for document in yaml.load_all(path.read_text(), yaml.CSafeLoader)]


def _applied(folder: Path, documents: list[Document]) -> list[Document]:
    """Return the documents after a kustomization or component has added and changed some."""
    (settings,) = load_all(folder / "kustomization.yaml")
    _known(settings, FIELDS)
    for name in settings.get("resources", ()):
        path = folder / name
        documents += build(path) if path.is_dir() else load_all(path)
    documents += [_config_map(folder, each) for each in settings.get("configMapGenerator", ())]
    for name in settings.get("components", ()):
        documents = _applied(folder / name, documents)
    for patch in settings.get("patches", ()):
        _known(patch, {"path", "target"})
        _patch(folder / patch["path"], patch.get("target"), documents)
    for document in documents:
        if settings.get("namespace") and document["kind"] != "Namespace":
            document["metadata"]["namespace"] = settings["namespace"]
        for container in _containers(document):
            for image in settings.get("images", ()):
                _known(image, {"name", "newName", "newTag"})
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    for replacement in settings.get("replacements", ()):
        _replace(replacement, documents)
    return documents


def _config_map(folder: Path, settings: Mapping[str, Any]) -> Document:
    _known(settings, {"name", "files", "options"})
    _known(settings["options"], {"disableNameSuffixHash", "labels"})
    data = {name: (folder / name).read_text() for name in settings["files"]}
    metadata = {"name": settings["name"], "labels": settings["options"]["labels"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _patch(path: Path, target: Mapping[str, str] | None, documents: list[Document]) -> None:
    """Change the documents that the target selects, or the one that the patch names."""
    (patch,) = load_all(path)
    if target is None:
        target = {"kind": patch["kind"], "name": patch["metadata"]["name"]}
    selected = _selected(target, documents)
    for document in selected:
        if isinstance(patch, list):
            for operation in patch:
                _operate(document, operation)
        else:
            content = {key: value for key, value in patch.items() if key not in ("apiVersion", "kind", "metadata")}
            _merge(document, content, has_schema=not document["apiVersion"].startswith("ray.io"))


def _selected(target: Mapping[str, str], documents: list[Document]) -> list[Document]:
    _known(target, {"kind", "name"})
    found = [
        document
        for document in documents
        if re.fullmatch(target["kind"], document["kind"])
        and re.fullmatch(target.get("name", ".*"), document["metadata"]["name"])
    ]
    if not found:
        raise ValueError(f"no object is {target}")
    return found


def _merge(old: Document, new: Mapping[str, Any], *, has_schema: bool) -> None:
    """Merge mappings and replace everything else, as Kustomize does with lists whose schema it does not know."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            _merge(old[key], value, has_schema=has_schema)
        elif isinstance(value, list) and has_schema:
            raise ValueError(f"{key}: merging a list of a Kubernetes object is not supported")
        else:
            old[key] = json.loads(json.dumps(value))


def _operate(document: Document, operation: Mapping[str, Any]) -> None:
    """Apply one operation of JSON Patch."""
    _known(operation, {"op", "path", "value"})
    *parents, last = [part.replace("~1", "/") for part in operation["path"].removeprefix("/").split("/")]
    place: Any = document
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    key: Any = int(last) if isinstance(place, list) and last != "-" else last
    match operation["op"]:
        case "add" if key == "-":
            place.append(operation["value"])
        case "add" if isinstance(place, dict):
            place[key] = json.loads(json.dumps(operation["value"]))
        case "replace":
            _must_exist(place, key)
            place[key] = json.loads(json.dumps(operation["value"]))
        case "remove":
            del place[key]
        case _:
            raise ValueError(f"{operation}: not supported")


def _containers(node: Any) -> Iterator[Document]:
    """Yield the containers anywhere in a document."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                yield from value
            else:
                yield from _containers(value)
    elif isinstance(node, list):
        for each in node:
            yield from _containers(each)


def _replace(replacement: Mapping[str, Any], documents: list[Document]) -> None:
    """Copy a field of one object to a field of others."""
    _known(replacement, {"source", "targets"})
    source = dict(replacement["source"])
    path = source.pop("fieldPath")
    (value,) = _selected(source, documents)
    for part in path.split("."):
        value = value[part]
    for target in replacement["targets"]:
        _known(target, {"select", "fieldPaths"})
        for each in _selected(target["select"], documents):
            for field in target["fieldPaths"]:
                *parents, last = field.split(".")
                place = each
                for part in parents:
                    place = place[part]
                _must_exist(place, last)
                place[last] = json.loads(json.dumps(value))


def _must_exist(place: Any, key: Any) -> None:
    if isinstance(place, dict) and key not in place:
        raise KeyError(key)


def _known(settings: Mapping[str, Any], fields: set[str]) -> None:
    if unknown := settings.keys() - fields:
        raise ValueError(f"{sorted(unknown)}: not supported; allowed: {sorted(fields)}")
