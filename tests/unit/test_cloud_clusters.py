"""The container image, `ray up` and SkyPilot files of cluster/, without a cloud."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.exceptions import ParamValidationError
from botocore.session import get_session
from botocore.validate import validate_parameters
from click.exceptions import NoSuchOption
from jsonschema import ValidationError, validate

from agr_ray.cli import COMMANDS
from agr_ray.config import parse
from agr_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
MISTAKES = (
    *(
        AssertionError,
        ConfigError,
        KeyError,
        NoSuchOption,
        ParamValidationError,
        SystemExit,
        ValidationError,
        ValueError,
    ),
    subprocess.CalledProcessError,
)
"""What `check` raises."""
HADOLINT = Path(sys.executable).with_name("hadolint")


def closed(**fields: Any) -> dict[str, Any]:
    """Return the schema of a mapping with these fields and no others."""
    return {"type": "object", "additionalProperties": False, "properties": fields}


TEXT, NUMBER, FLAG, TEXTS = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "object"}
GCP_NODE = closed(
    machineType=TEXT,
    disks={
        "items": closed(
            boot=FLAG,
            autoDelete=FLAG,
            type={"enum": ["PERSISTENT"]},
            initializeParams=closed(diskSizeGb=NUMBER, sourceImage=TEXT),
        )
    },
    scheduling=closed(provisioningModel={"enum": ["SPOT"]}, instanceTerminationAction={"enum": ["DELETE", "STOP"]}),
    serviceAccounts={"items": closed(email=TEXT, scopes={"items": TEXT})},
)
"""The fields of Compute Engine's instances that we use."""
PROVIDER = closed(
    type=TEXT, region=TEXT, availability_zone=TEXT, project_id=TEXT, cache_stopped_nodes=FLAG
)  # Ray allows any
TASK = closed(
    name=TEXT,
    workdir=TEXT,
    num_nodes=NUMBER,
    resources=closed(
        accelerators={"additionalProperties": NUMBER},
        cpus=TEXT,
        memory=TEXT,
        disk_size=NUMBER,
        use_spot=FLAG,
        job_recovery=closed(strategy={"enum": ["FAILOVER", "EAGER_NEXT_REGION"]}),
    ),
    envs=TEXTS,
    secrets=TEXTS,
    setup=TEXT,
    run=TEXT,
)
"""The fields of SkyPilot's tasks that we use."""


def check(path: Path) -> None:
    """Raise an exception if the file of a cluster has a mistake."""
    text = path.read_text()
    config = yaml.safe_load(text)
    if path.parent.name == "skypilot":
        validate(config, TASK)
        names = re.findall(r"\$(?:{)?([A-Z]\w+)", config["run"])
        assert {name for name in names if not name.startswith("SKYPILOT_")} <= config["envs"].keys()
        assert "num_workers 1-2" in config["run"]
        assert config["num_nodes"] == 2
        shell(config["setup"])
        shell(config["run"])
        commands(config["run"])
        return
    from ray.autoscaler._private.util import prepare_config, validate_config

    ray_up = prepare_config(config)
    validate_config(ray_up)
    validate(config["provider"], PROVIDER)
    for node in config["available_node_types"].values():
        if config["provider"]["type"] == "aws":
            members = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
            validate_parameters({"MinCount": 1, "MaxCount": 1} | node["node_config"], members)
        else:
            validate(node["node_config"], GCP_NODE)
    assert all((ROOT / source).exists() for source in config["file_mounts"].values() if not source.startswith("~"))
    for key in ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in config.get(key, ()):
            shell(command)
    for role in ("head", "worker"):
        (start,) = config[f"{role}_start_ray_commands"]
        assert "export RAY_AUTH_MODE=token && " in start
        ray_start(start.partition("ray start ")[2])


def shell(text: str) -> None:
    """Let bash read commands without running them."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, capture_output=True)


def ray_start(options: str) -> None:
    """Let Ray read the options of `ray start`."""
    from ray.scripts.scripts import start

    start.make_context("start", shlex.split(options.replace("$", "")))


def commands(text: str) -> None:
    """Parse each command of agr-ray in a script."""
    text = text.replace("\\\n", "")
    found = re.findall(r"^\s*python jobs/(\S+)\.py (.*)$", text, re.MULTILINE)
    assert found
    for name, options in found:
        parse(COMMANDS[name].job, shlex.split(options.replace("$RESULTS", "s3://results")), {})


FILES = [
    CLUSTER / "ray-up" / "aws.yaml",
    CLUSTER / "ray-up" / "gcp.yaml",
    CLUSTER / "skypilot" / "train.yaml",
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_has_no_mistakes(path: Path) -> None:
    check(path)


# The image


def hadolint(text: str) -> str:
    return subprocess.run([HADOLINT, "--no-color", "-"], input=text, capture_output=True, text=True).stdout


def test_the_dockerfile_passes_its_linter() -> None:
    text = (CLUSTER / "docker" / "Dockerfile").read_text()

    assert hadolint(text) == ""
    assert hadolint(text.replace("USER 1000", "USER root")) != ""
    assert hadolint(text.replace("COPY jobs", "KOPY jobs")) != ""


def test_the_dockerfile_copies_only_what_the_build_context_has() -> None:
    text = (CLUSTER / "docker" / "Dockerfile").read_text()
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (.*)$", text, re.MULTILINE)
    sources = [word for line in copied for word in line.split()[:-1] if not word.startswith("--")]

    assert len(sources) == 7
    for source in sources:
        assert any((source + "/").startswith(each + "/") for each in allowed), source
        if source != "cluster/docker/torch-*.lock":  # `make lock-cpu` writes it
            assert (ROOT / source).exists()


def test_the_image_has_the_python_of_the_nightly_pod_and_of_the_code_path() -> None:
    dockerfile = (CLUSTER / "docker" / "Dockerfile").read_text()
    ((image, version),) = set(re.findall(r"^FROM (python:(\d+\.\d+)\S+)", dockerfile, re.MULTILINE))

    assert f"image: {image}\n" in (CLUSTER / "kuberay" / "base" / "nightly.yaml").read_text()
    assert f"/python{version}/site-packages/agr_ray" in dockerfile
