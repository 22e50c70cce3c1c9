"""FairFace's published files as checkpoints. The files here have their names and shapes, and random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from prepared_sets import prepared_set
from torch import Tensor, nn

from agr_ray import cli
from agr_ray.config import EvaluateConfig, EvaluateJob
from agr_ray.data.rendered import render_photograph
from agr_ray.errors import ConfigError
from agr_ray.labels import FAIRFACE, LabelSpace
from agr_ray.models.checkpoint import read_checkpoint
from agr_ray.models.fairface import FOUR_RACES, fairface_network
from agr_ray.models.network_input import centre
from agr_ray.predict.face_model import FaceModel
from agr_ray.runtime.evaluate import evaluate
from agr_ray.vision.align import TEMPLATE_POINTS, align_face

SEVEN, FOUR = "res34_fair_align_multi_7_20190809.pt", "res34_fair_align_multi_4_20190809.pt"


@pytest.fixture(scope="module")
def published() -> nn.Module:
    """Return the published network, as its authors' predict.py builds it, with running statistics that matter."""
    torch.manual_seed(0)
    net = torchvision.models.resnet34()
    net.fc = nn.Linear(net.fc.in_features, 18)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


@pytest.fixture
def files(published: nn.Module, tmp_path: Path) -> Path:
    for name in (SEVEN, FOUR):
        torch.save(published.state_dict(), tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("space", [FAIRFACE, FOUR_RACES])
def test_probabilities_are_those_of_the_published_network(published: nn.Module, space: LabelSpace) -> None:
    images = torch.randn(3, 3, 224, 224)
    model, _ = fairface_network(published.state_dict(), space, "file")
    with torch.no_grad():
        theirs: Tensor = published(images)
        ours = model(images)
    heads = model.heads_by_task
    torch.testing.assert_close(heads["race"].read_out(ours["race"]), theirs[:, : len(space.races)].softmax(dim=1))
    male = theirs[:, 7:9].softmax(dim=1)[:, 0]  # their order is male, female
    torch.testing.assert_close(heads["gender"].read_out(ours["gender"]), male)
    torch.testing.assert_close(ours["age"].softmax(dim=1), theirs[:, 9:].softmax(dim=1))
    middles = torch.tensor([1.0, 6.0, 14.5, 24.5, 34.5, 44.5, 54.5, 64.5, 80.0])
    torch.testing.assert_close(heads["age"].read_out(ours["age"]), middles[theirs[:, 9:].argmax(dim=1)])


def test_each_age_is_in_the_group_that_was_predicted(published: nn.Module) -> None:
    model, _ = fairface_network(published.state_dict(), FAIRFACE, "file")
    ages = model.heads_by_task["age"].read_out(torch.eye(9)).numpy()
    assert FAIRFACE.age_group(ages).tolist() == list(range(9))


def test_the_network_sees_what_a_chip_of_dlib_shows(published: nn.Module) -> None:
    _, transform = fairface_network(published.state_dict(), FAIRFACE, "file")
    assert transform.image_size == 224
    landmarks = np.array(TEMPLATE_POINTS) * 400 + 100
    photograph = np.zeros((600, 600, 3), np.uint8)
    (left_x, left_y), (right_x, right_y) = landmarks[:2].round().astype(int)
    photograph[left_y - 4 : left_y + 5, left_x - 4 : left_x + 5, 0] = 255
    photograph[right_y - 4 : right_y + 5, right_x - 4 : right_x + 5, 1] = 255
    crop = align_face(photograph, landmarks, transform.crop_side_px, transform.margin)
    chip = centre(torch.from_numpy(crop).permute(2, 0, 1)[None], transform)[0].float()
    assert chip.shape == (3, 224, 224)
    # Eyes in a chip of 224 pixels with a padding of 0.25, from the mean face of dlib's five points.
    for channel, corners_x in enumerate([(0.1205750620789, 0.3340850613712), (0.8595674595992, 0.6460604764104)]):
        weight = chip[channel] / chip[channel].sum()
        found_x = float((weight.sum(dim=0) * torch.arange(224)).sum()) + 0.5
        found_y = float((weight.sum(dim=1) * torch.arange(224)).sum()) + 0.5
        assert found_x == pytest.approx((0.25 + sum(corners_x) / 2) / 1.5 * 224, abs=1.0)
        assert found_y == pytest.approx((0.25 + 0.2213) / 1.5 * 224, abs=1.0)


@pytest.mark.parametrize(
    ("name", "more", "space"), [(SEVEN, [], FAIRFACE), (FOUR, [], FOUR_RACES), (SEVEN, ["--races", "4"], FOUR_RACES)]
)
def test_an_imported_checkpoint_predicts(
    files: Path, name: str, more: list[str], space: object, capsys: pytest.CaptureFixture[str]
) -> None:
    out = files / "fairface"
    cli.main(["import", "fairface", str(files / name), "--out", str(out), *more])
    assert "agr-ray score --checkpoint" in capsys.readouterr().out
    loaded = read_checkpoint(out)
    assert loaded.space == space
    card = (out / "model_card.md").read_text()
    assert "CC BY 4.0" in card
    assert name in card
    assert "Not trained" not in card
    (photo,) = FaceModel.load(str(out)).predict([render_photograph(0, 0, 640, 480, 1).image_rgb])
    (face,) = photo.faces
    assert face.race_probs is not None
    assert list(face.race_probs) == list(loaded.space.races)
    assert sum(face.race_probs.values()) == pytest.approx(1.0, abs=1e-5)


def test_an_import_can_be_repeated(files: Path) -> None:
    command = ["import", "fairface", str(files / SEVEN), "--out", str(files / "fairface")]
    cli.main(command)
    before = (files / "fairface" / "meta.json").read_bytes()
    cli.main(command)
    assert (files / "fairface" / "meta.json").read_bytes() == before


@pytest.mark.parametrize("inside", [".", "fairface", "photographs"])
def test_an_import_replaces_nothing(files: Path, inside: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fairface/weights.pt", "photographs/party.jpg"):
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_bytes(b"irreplaceable")
    before = sorted(files.rglob("*"))

    with pytest.raises(SystemExit) as ended:
        cli.main(["import", "fairface", str(files / SEVEN), "--out", str(files / inside)])

    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: --out {files / inside}: is not empty; give a new folder or prefix\n"
    assert sorted(files.rglob("*")) == before


def test_an_import_that_was_killed_can_be_repeated(files: Path) -> None:
    """On S3 the marker is written last, so a killed import leaves some of its files."""
    command = ["import", "fairface", str(files / SEVEN), "--out", str(files / "fairface")]
    cli.main(command)
    (files / "fairface" / "meta.json").unlink()
    cli.main(command)
    assert (files / "fairface" / "meta.json").exists()


def test_corrected_ages_of_groups_are_rejected(files: Path, tmp_path: Path) -> None:
    cli.main(["import", "fairface", str(files / SEVEN), "--out", str(files / "fairface")])
    data = prepared_set(tmp_path / "set", side_px=196)
    config = {"checkpoint": str(files / "fairface"), "data": str(data), "calibrate": True, "correct_age": True}
    with pytest.raises(ConfigError, match=r"evaluate\.correct_age: the age head groups"):
        evaluate(EvaluateJob(evaluate=EvaluateConfig(**config)))


def test_an_import_does_not_replace_another_checkpoint(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["import", "fairface", str(files / SEVEN), "--out", str(files / "fairface")]
    cli.main(command)
    before = (files / "fairface" / "meta.json").read_bytes()

    with pytest.raises(SystemExit):
        cli.main([*command, "--races", "4"])

    assert "is not empty" in capsys.readouterr().err
    assert (files / "fairface" / "meta.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("multi_7.pt", None, "multi_7.pt"),
        ("multi_7.pt", None, "FairFace's README links to its files: https://github.com/joojs/fairface"),
        ("fairface.pt", lambda: torchvision.models.resnet34(num_classes=18), "give the number of races: --races 7 or"),
        ("multi_7.pt", lambda: torchvision.models.resnet34(), "fc.weight: expected shape [18, 512], found [1000, 512]"),
        ("multi_7.pt", lambda: torchvision.models.resnet18(num_classes=18), "layer1.2.conv1.weight"),
        ("multi_7.pt", lambda: nn.Linear(2, 2), "fc.weight: expected shape [18, 512], found nothing"),
    ],
)
def test_other_files_are_rejected_with_one_line(
    tmp_path: Path, name: str, make: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if callable(make):
        torch.save(make().state_dict(), tmp_path / name)
    with pytest.raises(SystemExit) as ended:
        cli.main(["import", "fairface", str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
