"""The schemas of KubeRay's RayJob and RayCronJob, made strict, from kuberay/schemas.json.xz.

python tests/unit/kuberay_schemas.py FOLDER    makes that file from KubeRay's CRDs (ray.io_rayjobs.yaml, ...)
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("kuberay") / "schemas.json.xz"
KINDS = {"RayJob": "ray.io_rayjobs.yaml", "RayCronJob": "ray.io_raycronjobs.yaml"}


def kuberay_schemas() -> dict[str, Any]:
    """Return the schema of each kind. It rejects unknown fields, which Kubernetes itself drops."""
    return strict(json.loads(lzma.decompress(FILE.read_bytes())))


def strict(schema: Any) -> Any:
    """Add `additionalProperties: false` to each object whose fields the schema lists."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields")
    return ({"additionalProperties": False} if closed else {}) | {key: strict(value) for key, value in schema.items()}


def main(folder: Path) -> None:
    """Write the file."""
    schemas = {}
    for kind, name in KINDS.items():
        versions = yaml.safe_load((folder / name).read_text())["spec"]["versions"]
        schemas[kind] = next(each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1")
        del schemas[kind]["properties"]["status"]
    FILE.write_bytes(lzma.compress(json.dumps(schemas, separators=(",", ":")).encode(), preset=9))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
