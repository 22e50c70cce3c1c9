"""The backbones are the published networks: the same features, parameters and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from agr_ray.config import ModelConfig
from agr_ray.labels import UTKFACE
from agr_ray.models.backbones.base import Backbone, WeightsError
from agr_ray.models.network import MultiTaskNet, backbone_class
from agr_ray.models.pretrained import load_backbone, pretrained_weights
from agr_ray.predict.inference import for_inference
from agr_ray.registry import BACKBONES, PUBLISHED_WEIGHTS
from agr_ray.storage import Storage

# Parameters in millions as published (torchvision, facenet-pytorch), without the last layer; map channels by stage.
PUBLISHED: dict[str, tuple[int, tuple[int, ...]]] = {
    "resnet18": (11_176_512, (64, 64, 128, 256, 512)),
    "resnet34": (21_284_672, (64, 64, 128, 256, 512)),
    "resnet50": (23_508_032, (64, 256, 512, 1024, 2048)),
    "resnet101": (42_500_160, (64, 256, 512, 1024, 2048)),
    "mobilenet_v3_small": (1_517_856, (16, 16, 24, 48, 576)),
    "mobilenet_v3_large": (4_202_032, (16, 24, 40, 112, 960)),
    "efficientnet_b0": (4_007_548, (16, 24, 40, 112, 1280)),
    "efficientnet_b3": (10_696_232, (24, 32, 48, 136, 1536)),
    "vgg16": (14_714_688, (64, 128, 256, 512, 512, 512)),
    "convnext_tiny": (27_820_128, (96, 192, 384, 768)),
    "vit_b_16": (85_798_656, (768,)),
    "swin_t": (27_519_354, (96, 192, 384, 768)),
    "inception_resnet_v1": (23_482_624, (64, 192, 256, 896, 1792)),
    "plain_cnn": (388_896, (32, 64, 128, 256, 256)),
}
LAST = {"resnet": "fc", "mobilenet": "classifier.3", "efficientnet": "classifier.1", "convnext": "classifier.2"}
LAST |= {"vit": "heads.head", "swin": "head"}


def backbone_of(name: str) -> Backbone:
    torch.manual_seed(0)
    backbone: Backbone = BACKBONES[name](name)
    return backbone.eval()


def images(side_px: int) -> Tensor:
    return torch.randn(2, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


def unchanged(_: int, feature_map: Tensor) -> Tensor:
    return feature_map


def test_every_backbone_is_checked() -> None:
    assert list(PUBLISHED) == list(BACKBONES.names)


def test_the_registry_knows_which_weights_each_backbone_publishes() -> None:
    listed = {
        name: tuple(weights for weights, backbones in PUBLISHED_WEIGHTS.items() if name in backbones)
        for name in BACKBONES.names
    }
    assert listed == {name: backbone_class(name).published for name in BACKBONES.names}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest) -> tuple[str, Backbone]:
    """Return a name and its backbone, with any weights."""
    return request.param, backbone_of(request.param)


def test_parameters_and_channels_are_the_published_ones(published: tuple[str, Backbone]) -> None:
    name, backbone = published
    num_parameters, channels = PUBLISHED[name]

    assert sum(p.numel() for p in backbone.parameters()) == num_parameters
    assert backbone.stage_channels == channels
    assert backbone.num_channels == channels[-1]
    stages = backbone.stages()
    assert sorted(map(id, backbone.parameters())) == sorted(id(p) for stage in stages for p in stage)
    assert all(stages)


@pytest.mark.parametrize(
    "published", [name for name in PUBLISHED if name not in ("inception_resnet_v1", "plain_cnn")], indirect=True
)
def test_features_are_those_of_torchvision(published: tuple[str, Backbone]) -> None:
    name, backbone = published
    torch.manual_seed(1)
    net: Any = torchvision.models.get_model(name, weights=None).eval()
    state = {key: value for key, value in net.state_dict().items() if not key.startswith(backbone.replaced_layers)}
    assert list(backbone.state_dict()) == list(state)
    backbone.load_state_dict(state)
    x = images(224 if name == "vit_b_16" else 64)

    with torch.no_grad():
        feature_map = backbone(x)
        if name == "vgg16":
            torch.testing.assert_close(feature_map, net.features(x))
            return
        if name.startswith("resnet"):  # its layers are our own
            net.avgpool = net.fc = nn.Identity()
            torch.testing.assert_close(feature_map.flatten(1), net(x), rtol=0, atol=0)
            return
        parent, _, child = LAST[name.partition("_")[0].rstrip("0123456789")].rpartition(".")
        setattr(net.get_submodule(parent), child, nn.Identity())
        features = backbone.project(feature_map.mean(dim=(2, 3)))
        torch.testing.assert_close(features, net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "file"),
    [("vggface2", "20180402-114759-vggface2.pt"), ("casia-webface", "20180408-102900-casia-webface.pt")],
)
def test_weights_of_facenet_pytorch_are_found_by_name(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from facenet_pytorch import InceptionResnetV1

    torch.manual_seed(0)
    donor = InceptionResnetV1(classify=True, num_classes=10)
    downloaded = tmp_path / "hub" / "checkpoints" / file
    downloaded.parent.mkdir(parents=True)
    torch.save(donor.state_dict(), downloaded)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = MultiTaskNet(ModelConfig(preset="faceage"), UTKFACE)

    weights = pretrained_weights(model.backbone, name, Storage())
    assert weights is not None
    load_backbone(model, weights)

    torch.testing.assert_close(model.backbone.state_dict()["last_bn.weight"], donor.last_bn.weight)
    torch.testing.assert_close(
        model.backbone.state_dict()["conv2d_1a.conv.weight"], donor.conv2d_1a.conv.weight, rtol=0, atol=0
    )


def test_features_are_those_of_facenet_pytorch() -> None:
    from facenet_pytorch import InceptionResnetV1

    net = InceptionResnetV1().eval()
    backbone = backbone_of("inception_resnet_v1")
    backbone.load_state_dict(net.state_dict())
    pixels = torch.randint(0, 256, (2, 3, 160, 160), generator=torch.Generator().manual_seed(0)).float()
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    with torch.no_grad():
        embeddings = backbone.project(backbone((pixels / 255 - mean) / std).mean(dim=(2, 3)))
        expected = net((pixels - 127.5) / 128)
    torch.testing.assert_close(nn.functional.normalize(embeddings), expected, rtol=1e-3, atol=1e-5)


def test_the_last_map_is_the_result_and_each_stage_is_changed_once(published: tuple[str, Backbone]) -> None:
    name, backbone = published
    x = images(96)
    seen: list[tuple[int, int]] = []

    def note(index: int, feature_map: Tensor) -> Tensor:
        seen.append((index, feature_map.shape[1]))
        return feature_map * 0.5 if index == 0 else feature_map

    with torch.no_grad():
        maps = backbone.feature_maps(x, unchanged)
        changed = backbone.feature_maps(x, note)
        torch.testing.assert_close(maps[-1], backbone(x))
    assert seen == list(enumerate(PUBLISHED[name][1]))
    torch.testing.assert_close(changed[0], maps[0] * 0.5)
    sides = [each.shape[-1] for each in maps]
    assert sides == sorted(sides, reverse=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_network_for_inference_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = MultiTaskNet(ModelConfig(backbone=name, image_size=96, attention="cbam"), UTKFACE)
    with torch.no_grad():
        model.train()(images(96))  # running statistics other than 0 and 1
        model.eval()
        expected, found = model(images(96)), for_inference(model, "float32")(images(96))
    for task, values in expected.items():
        torch.testing.assert_close(found[task], values, rtol=1e-3, atol=1e-3)


def test_interpolated_position_embeddings_keep_rows_and_columns() -> None:
    backbone = backbone_of("vit_b_16")
    with torch.no_grad():
        rows, columns = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
        backbone.encoder.pos_embedding.zero_()
        backbone.encoder.pos_embedding[0, 1:, 0] = rows.flatten()
        backbone.encoder.pos_embedding[0, 1:, 1] = columns.flatten()
        resized = backbone.positions(7, 4)[0, 1:].reshape(7, 4, -1)

    assert resized[:, 0, 0].diff().min() > 1.0  # rows two apart
    assert resized[0, :, 1].diff().min() > 2.0  # columns three and a half apart
    assert resized[:, :, 0].std(dim=1).max() < 1e-4
    assert resized[:, :, 1].std(dim=0).max() < 1e-4


def test_a_page_instead_of_the_weights_is_an_error_of_one_line_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hub" / "checkpoints" / "20180402-114759-vggface2.pt"
    file.parent.mkdir(parents=True)
    file.write_text("<html>Please log in</html>")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    with pytest.raises(
        WeightsError, match=r"vggface2\.pt could not be downloaded: .*without internet access"
    ) as raised:
        pretrained_weights(backbone_of("inception_resnet_v1"), "vggface2", Storage())

    assert str(raised.value).count("\n") == 0
    assert not file.exists()


def test_the_position_embeddings_of_a_vit_are_interpolated() -> None:
    backbone = backbone_of("vit_b_16")

    with torch.no_grad():
        shapes = [backbone(images(side_px)).shape for side_px in (64, 96, 224)]
    assert shapes == [(2, 768, 1, 1)] * 3
