"""The network: heads, initial weights, and errors about weights that don't fit."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from agr_ray.config import ModelConfig
from agr_ray.errors import ConfigError
from agr_ray.labels import ADIENCE, AGE_MAX_YEARS, FAIRFACE, UTKFACE
from agr_ray.models.backbones.base import WeightsError
from agr_ray.models.heads.year_bins import AGE_BINS_YEARS
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.pretrained import load_backbone, pretrained_weights, read_state
from agr_ray.models.transform import Transform
from agr_ray.storage import Storage

SIDE = 32


def small(**values: object) -> ModelConfig:
    return ModelConfig(**{"backbone": "mobilenet_v3_small", "image_size": SIDE, **values})


def images(num: int = 2) -> torch.Tensor:
    return torch.randn(num, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenet_v3_small", "mobilenet_v3_large"])
def test_every_backbone_predicts_every_task(backbone: str) -> None:
    model = MultiTaskNet(small(backbone=backbone), UTKFACE).eval()
    with torch.inference_mode():
        outputs = model(images())
    assert {task: tuple(values.shape) for task, values in outputs.items()} == {
        "age": (2,),
        "gender": (2,),
        "race": (2, len(UTKFACE.races)),
    }


def test_a_distribution_predicts_its_expectation_over_all_ages() -> None:
    model = MultiTaskNet(small(age_head="distribution"), UTKFACE).eval()
    with torch.inference_mode():
        outputs = model(images())
    probabilities = outputs["age"].logits.softmax(dim=1)
    expected = (probabilities * torch.arange(len(AGE_BINS_YEARS))).sum(dim=1)
    assert AGE_BINS_YEARS[-1] == AGE_MAX_YEARS
    torch.testing.assert_close(outputs["age"].years, expected)


@pytest.mark.parametrize("age_head", ["linear", "distribution"])
def test_untrained_network_guesses_the_age_that_it_was_given(age_head: str) -> None:
    model = MultiTaskNet(small(age_head=age_head), UTKFACE).eval()
    model.initialise({"age": np.array([28.0, np.nan, 38.0], np.float32)})
    with torch.inference_mode():
        ages = model.heads_by_task["age"].read_out(model(images())["age"])
    assert ages.tolist() == pytest.approx([33.0, 33.0], abs=2.0)


def test_there_are_outputs_only_for_tasks() -> None:
    assert list(MultiTaskNet(small(tasks=("race", "gender")), UTKFACE).eval()(images())) == ["gender", "race"]


def test_the_label_space_gives_the_number_of_classes() -> None:
    assert MultiTaskNet(small(tasks=("race",)), FAIRFACE).eval()(images())["race"].shape == (2, 7)
    for config in (small(), small(tasks=("race",))):
        with pytest.raises(ConfigError, match=r"model\.tasks: .* adience has no races; allowed: age, gender$"):
            MultiTaskNet(config, ADIENCE)


def test_heads_compute_in_float32_under_autocast() -> None:
    model = MultiTaskNet(small(), UTKFACE).eval()
    model.initialise({"age": np.array([100.1])})
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images())
    assert [values.dtype for values in outputs.values()] == [torch.float32] * 3


def test_batch_norm_momentum_is_overridden() -> None:
    def momenta(config: ModelConfig) -> set[float | None]:
        norms = (m for m in MultiTaskNet(config, UTKFACE).modules() if isinstance(m, torch.nn.BatchNorm2d))
        return {norm.momentum for norm in norms}

    assert momenta(small(bn_momentum=0.25)) == {0.25}
    assert momenta(small()) == {0.01}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_backbone_takes_a_torchvision_state_dict(tmp_path: Path, suffix: str) -> None:
    donor = torchvision.models.mobilenet_v3_small()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(donor.state_dict(), path)
    else:
        save_file(donor.state_dict(), path)
    model = MultiTaskNet(small(pretrained=str(path)), UTKFACE)
    state = pretrained_weights(model.backbone, str(path), Storage())
    assert state is not None
    load_backbone(model, state)
    donor.classifier[3] = torch.nn.Identity()
    model.eval()
    features = model.backbone.project(model.neck([model.backbone(images())]))
    torch.testing.assert_close(features, donor.eval()(images()))


def test_weights_of_another_backbone_name_tensor_expected_and_found() -> None:
    model = MultiTaskNet(small(backbone="resnet18"), UTKFACE)
    state = torchvision.models.resnet18().state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    with pytest.raises(WeightsError, match=r"layer1\.0\.conv1\.weight: expected .*64, 64, 3, 3.* found .*64, 64, 1, 1"):
        load_backbone(model, state)
    with pytest.raises(WeightsError, match=r"backbone resnet18: conv1\.weight: expected shape .* found nothing"):
        load_backbone(model, MultiTaskNet(small(), UTKFACE).backbone.state_dict())


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("missing.pth", None, "No such file"),
        ("text.pth", b"not weights", "not a state dict"),
        ("page.pth", b"hello world", "not a state dict"),  # a KeyError of the unpickler
        ("empty.pth", b"", "not a state dict"),
        ("text.safetensors", b"not weights", "not a state dict"),
    ],
)
def test_unreadable_weights_give_one_line_with_the_path(
    tmp_path: Path, name: str, body: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if body is not None:
        path.write_bytes(body)
    with pytest.raises(WeightsError) as raised:
        read_state(path)
    assert str(path) in str(raised.value)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unreadable_weights_in_storage_are_named_by_their_uri(tmp_path: Path) -> None:
    path = tmp_path / "text.pth"
    path.write_bytes(b"not weights")
    with pytest.raises(WeightsError, match=rf"^{path}: not a state dict"):
        pretrained_weights(MultiTaskNet(small(), UTKFACE).backbone, str(path), Storage())


def test_pickled_code_is_rejected(tmp_path: Path) -> None:
    torch.save({"weight": Path("anything")}, tmp_path / "code.pth")
    with pytest.raises(WeightsError, match="not a state dict"):
        read_state(tmp_path / "code.pth")


def test_imagenet_weights_without_network_name_the_address_and_an_alternative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of another test
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(WeightsError) as raised:
        pretrained_weights(MultiTaskNet(small(), UTKFACE).backbone, "imagenet", Storage())
    message = str(raised.value)
    assert "https://" in message
    assert "mobilenet_v3_small" in message
    assert "refused" in message
    assert "set model.pretrained to its path" in message
    assert "\n" not in message


def test_weights_of_another_backbone_list_those_that_it_has() -> None:
    with pytest.raises(WeightsError, match=r"^vggface2: .* allowed: none, imagenet, or the path or URI"):
        pretrained_weights(MultiTaskNet(small(), UTKFACE).backbone, "vggface2", Storage())
    with pytest.raises(WeightsError, match=r"^imagenet: .* allowed: none, or the path or URI"):
        pretrained_weights(MultiTaskNet(ModelConfig(preset="plain_cnn"), UTKFACE).backbone, "imagenet", Storage())


@pytest.mark.parametrize("window", [(0.0, 0.0, 1.0), (-0.1, 0.0, 1.05)])
def test_transform_survives_json(window: tuple[float, float, float]) -> None:
    transform = Transform(image_size=88, crop_side_px=112, mean=(0.1, 0.2, 0.3), window=window)
    assert Transform.from_json(transform.to_json()) == transform


@pytest.mark.parametrize("equalize", [False, True])
def test_equalisation_survives_json(equalize: bool) -> None:
    transform = Transform(88, 112, equalize=equalize)

    assert transform.to_json()["equalize"] is equalize
    assert Transform.from_json(transform.to_json()) == transform


def test_transform_with_an_unknown_key_is_rejected() -> None:
    with pytest.raises(ValueError, match="gamma"):
        Transform.from_json({**Transform(88, 88).to_json(), "gamma": 2.0})
