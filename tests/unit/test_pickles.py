"""No file from elsewhere is unpickled: a pickle can run any code."""

from __future__ import annotations

import ast
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from agr_ray import cli
from agr_ray.config import ModelConfig
from agr_ray.labels import UTKFACE
from agr_ray.models.backbones.base import WeightsError
from agr_ray.models.checkpoint import TRAIN_STATE, CheckpointError
from agr_ray.models.checkpoint_network import load_train_state
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.pretrained import pretrained_weights
from agr_ray.storage import Storage

ROOT = Path(__file__).parents[2]
FOLDERS = ("agr_ray", "benchmarks", "cluster", "jobs", "tools")
UNSAFE = {
    *(f"{module}.{name}" for module in ("pickle", "cloudpickle", "marshal", "dill") for name in ("load", "loads")),
    *("pickle.Unpickler", "shelve.open", "joblib.load", "yaml.load", "yaml.unsafe_load", "eval", "exec"),
    *("pd.read_pickle", "pandas.read_pickle"),
}
"""Calls that are never allowed."""
WEIGHTS_ONLY = ("load_state_dict_from_url", "get_state_dict")
"""Functions that unpickle anything unless they are told not to; torch.load is another."""


def unsafe_calls(source: str) -> list[str]:
    """Return the calls in Python code that may unpickle or run foreign data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
        loads_torch = name == "torch.load" or name.rpartition(".")[2] in WEIGHTS_ONLY
        if (
            name in UNSAFE
            or (loads_torch and options.get("weights_only") != "True")
            or options.get("allow_pickle", "False") != "False"
        ):
            found.append(ast.unparse(node))
    return found


def test_no_code_unpickles_foreign_data() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 200

    found = {str(path.relative_to(ROOT)): unsafe_calls(path.read_text()) for path in files}

    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "source",
    [
        "pickle.loads(body)",
        "cloudpickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "weights.get_state_dict(progress=False)",
        "torch.hub.load_state_dict_from_url(url)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader)",
        "joblib.load(path)",
        "def f():\n    return eval(text)",
    ],
)
def test_every_way_to_unpickle_is_found(source: str) -> None:
    assert len(unsafe_calls(source)) == 1
    assert unsafe_calls("torch.load(path, weights_only=True)\nmodel.eval()\njson.loads(text)") == []


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Return the path that a payload would make."""
    trace = tmp_path / "the payload ran"
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()  # it works
    trace.rmdir()
    return trace


def planted(path: Path, trace: Path, form: str) -> Path:
    """Write a malicious file, as a plain pickle or in one of torch's two formats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"weight": torch.zeros(1), "epoch": Payload(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


FORMS = ("pickle", "zip", "legacy")


@pytest.mark.parametrize("form", FORMS)
def test_a_malicious_training_state_is_rejected(tmp_path: Path, trace: Path, form: str) -> None:
    planted(tmp_path / TRAIN_STATE, trace, form)

    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/train_state\.pt: expected the state of a .*, found ") as e:
        load_train_state(tmp_path)

    assert "\n" not in str(e.value)
    assert not trace.exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_malicious_file_of_weights_is_rejected_by_import(
    tmp_path: Path, trace: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = planted(tmp_path / "multi_7.pt", trace, form)

    with pytest.raises(SystemExit) as ended:
        cli.main(["import", "fairface", str(path), "--out", str(tmp_path / "out")])

    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert said.startswith(f"error: {path}: not a state dict: ")
    assert not trace.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_malicious_pretrained_weights_are_rejected(tmp_path: Path, trace: Path, form: str, suffix: str) -> None:
    path = planted(tmp_path / f"weights.{suffix}", trace, form)
    model = MultiTaskNet(ModelConfig(backbone="mobilenet_v3_small", image_size=32), UTKFACE)

    with pytest.raises(WeightsError, match=rf"^{path}: not a state dict: ") as raised:
        pretrained_weights(model.backbone, str(path), Storage())

    assert "\n" not in str(raised.value)
    assert not trace.exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_malicious_file_in_the_cache_of_downloads_is_rejected(
    tmp_path: Path, trace: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.get_model_weights("mobilenet_v3_small").DEFAULT.url
    planted(tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2], trace, form)
    model = MultiTaskNet(ModelConfig(backbone="mobilenet_v3_small", image_size=32), UTKFACE)

    with pytest.raises(WeightsError) as raised:
        pretrained_weights(model.backbone, "imagenet", Storage())

    assert "\n" not in str(raised.value)
    assert not trace.exists()
