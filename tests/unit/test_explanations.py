"""Grad-CAM maps, the choice of cases, nearest images and sheets."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from PIL import Image

from agr_ray.config import EvaluateConfig, ModelConfig
from agr_ray.evaluation.cases import all_rows, badness, choose_cases, worst_by_group
from agr_ray.evaluation.nearest import Nearest
from agr_ray.labels import UTKFACE, Labels
from agr_ray.models.network import MultiTaskNet
from agr_ray.predict.grad_cam import NoFeatureMap, grad_cam
from agr_ray.registry import HEADS
from agr_ray.report.explanations import Face, Pair, Row, case_face, faces_sheet, overlaid, pairs_sheet

NAN = float("nan")


def network(backbone: str = "resnet18", side: int = 128, **changes: Any) -> MultiTaskNet:
    torch.manual_seed(0)
    model = MultiTaskNet(ModelConfig(backbone=backbone, image_size=side, dropout=0.0, **changes), UTKFACE)
    model.initialise({"age": np.array([20.0, 60.0])})
    return model.eval()


def images(num: int = 2, side: int = 128) -> torch.Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(1))


def scaled(heat: torch.Tensor, side: int) -> NDArray[np.float32]:
    """Return a map as Grad-CAM defines it: rectified, enlarged, and divided by its maximum."""
    large = F.interpolate(heat.relu()[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
    return np.asarray((large / large.amax(dim=(1, 2), keepdim=True)).detach().numpy(), np.float32)


@pytest.mark.parametrize("task", ["age", "gender", "race"])
def test_with_a_linear_head_the_map_is_the_class_activation_map(task: str) -> None:
    """Selvaraju et al., section 3.1: with average pooling and a linear layer, the weights are those of the layer."""
    model, batch = network(), images()
    last = model.backbone.feature_maps(batch, lambda _, each: each)[-1]
    weights = model.heads_by_task[task].layer.weight  # type: ignore[union-attr]
    predicted = model.heads_by_task[task].read_out(model(batch)[task])
    if task == "gender":
        weights = torch.where(predicted[:, None] > 0.5, weights, -weights)
    elif task == "race":
        weights = weights[predicted.argmax(dim=1)]
    expected = scaled((weights.expand(2, -1)[:, :, None, None] * last).sum(dim=1), 128)

    assert last.shape[-2:] == (4, 4)
    np.testing.assert_allclose(grad_cam(model, batch, task), expected, atol=1e-4)
    assert not model.neck._forward_pre_hooks


def test_an_image_has_the_same_map_in_any_batch() -> None:
    model, batch = network(), images(3)

    np.testing.assert_allclose(grad_cam(model, batch, "race")[1:2], grad_cam(model, batch[1:2], "race"), atol=1e-4)


def test_a_small_image_is_explained_by_an_earlier_map() -> None:
    model, batch = network(side=64), images(side=64)

    heat = grad_cam(model, batch, "gender")

    assert [each.shape[-1] for each in model.backbone.feature_maps(batch, lambda _, each: each)][-2:] == [4, 2]
    assert heat.shape == (2, 64, 64)
    assert heat.max() == 1.0
    # Enlarged from 4 x 4 positions, the outermost 8 pixels are alike; from 2 x 2, the outermost 16 would be.
    assert np.ptp(heat[:, :, :8], axis=2).max() < 1e-6
    assert np.ptp(heat[:, :, :16], axis=2).max() > 0.01


def test_transformers_give_maps_only_if_they_have_positions() -> None:
    assert grad_cam(network("swin_t", 64), images(1, 64), "age").shape == (1, 64, 64)
    with pytest.raises(NoFeatureMap, match="the backbone vit_b_16 has no feature map with several positions"):
        grad_cam(network("vit_b_16", 64), images(1, 64), "age")


@pytest.mark.parametrize("head", HEADS["age"].names)
@pytest.mark.parametrize("routing", ["none", "soft"])
def test_the_evidence_of_every_age_head_has_a_gradient(head: str, routing: str) -> None:
    model = network("mobilenet_v3_small", 32, age_head=head, age_routing=routing)
    features = torch.randn(3, model.backbone.num_features, requires_grad=True)
    age = model.heads_by_task["age"]
    outputs = age(features) if routing == "none" else age(features, torch.full((3,), 0.7))

    evidence = age.evidence(outputs)
    (gradient,) = torch.autograd.grad(evidence.sum(), features)

    assert evidence.shape == (3,)
    assert (gradient.abs().sum(dim=1) > 0).all()


def test_the_evidence_of_a_class_is_the_logit_in_its_favour() -> None:
    heads = network("mobilenet_v3_small", 32).heads_by_task

    assert heads["gender"].evidence(torch.tensor([-2.0, 3.0])).tolist() == [2.0, 3.0]
    assert heads["race"].evidence(torch.tensor([[-2.0, 3.0, 1.0, 0.0, 0.0]])).tolist() == [3.0]


def labels(age: list[float], gender: list[int], race: list[int]) -> Labels:
    return Labels(UTKFACE, np.array(age, np.float32), np.array(gender, np.int64), np.array(race, np.int64))


TRUTH = labels([30, 30, 30, 30, NAN, 60], [0, 0, 1, 1, 1, -1], [0, 0, 0, 1, 1, 1])
GUESS = {
    "age": np.array([34, 36, 41, 70, 30, 20], np.float32),
    "gender": np.array([0.1, 0.7, 0.2, 0.6, 0.4, 0.9], np.float32),
    "race": np.array([[0.9, 0.1, 0, 0, 0], [0.4, 0.6, 0, 0, 0], *[[0.2, 0.8, 0, 0, 0]] * 4], np.float32),
}


def test_badness_by_hand() -> None:
    np.testing.assert_array_equal(badness(TRUTH, GUESS, "age"), [0, 0, 11, 40, NAN, 40])
    np.testing.assert_allclose(badness(TRUTH, GUESS, "gender"), [0, 0.7, 0.8, 0, 0.6, NAN], atol=1e-6)
    np.testing.assert_allclose(badness(TRUTH, GUESS, "race"), [0, 0.6, 0.8, 0, 0, 0], atol=1e-6)


def test_right_cases_are_clearly_right_and_wrong_ones_begin_with_the_worst() -> None:
    rng = np.random.default_rng(0)

    age, gender = (choose_cases(TRUTH, GUESS, task, 2, rng) for task in ("age", "gender"))

    assert (age.right.tolist(), age.wrong.tolist()) == ([0], [3, 5])
    assert (gender.right.tolist(), gender.wrong.tolist()) == ([0, 3], [2, 1])
    assert all_rows([age.wrong, gender.wrong, age.wrong]).tolist() == [1, 2, 3, 5]


def test_the_worst_of_each_group_are_of_that_group() -> None:
    groups = worst_by_group(TRUTH, GUESS, "gender", 5)

    assert [(each.group, each.n, each.wrong.tolist()) for each in groups] == [
        ("female/white", 2, [1]),
        ("male/white", 1, [2]),
        ("male/black", 2, [4]),
    ]
    unknown = labels(TRUTH.age.tolist(), TRUTH.gender.tolist(), [-1] * 6)
    assert [(each.group, each.n) for each in worst_by_group(unknown, GUESS, "age", 5)] == [("female", 2), ("male", 2)]


def test_nearest_images_are_found_in_any_order_of_parts() -> None:
    rng = np.random.default_rng(0)
    features = rng.random((5, 16)).astype(np.float32)
    hashes = rng.integers(0, 2**63, 5).astype(np.uint64)
    others, other_hashes = rng.random((40, 16)).astype(np.float32), rng.integers(0, 2**63, 40).astype(np.uint64)
    others[7], other_hashes[9] = 2 * features[3] - features.mean(axis=0), hashes[2] ^ np.uint64(0b101)
    names = [f"train {k:02d}" for k in range(40)]
    results = []
    for order in (np.arange(40), rng.permutation(40)):
        nearest = Nearest(features, hashes)
        for part in np.array_split(order, 3):
            nearest.update([names[k] for k in part], others[part], other_hashes[part])
        results.append((nearest.by_features, nearest.by_hash, nearest.distance_bits.tolist()))

    assert results[0] == results[1]
    assert (nearest.by_features[3], nearest.by_hash[2], nearest.distance_bits[2]) == ("train 07", "train 09", 2)
    assert nearest.cosine[3] == pytest.approx(1.0, abs=1e-5)
    assert nearest.cosine[[0, 1, 2, 4]].max() < 0.99
    centred, centred_others = features - features.mean(axis=0), others - features.mean(axis=0)
    cosines = centred @ centred_others.T / np.linalg.norm(centred, axis=1)[:, None]
    best = (cosines / np.linalg.norm(centred_others, axis=1)).argmax(axis=1)
    assert nearest.by_features == [names[k] for k in best]


def test_a_heat_map_colours_only_hot_places() -> None:
    rgb = np.full((2, 2, 3), (90, 120, 150), np.uint8)

    result = overlaid(rgb, np.array([[0, 0], [0, 1]], np.float32))

    assert result[0, 0].tolist() == [120, 120, 120]
    assert len(set(result[1, 1].tolist())) == 3


def face(value: int, heat: bool = False) -> Face:
    return Face(np.full((8, 8, 3), value, np.uint8), "label $1\nmodel", np.ones((8, 8), np.float32) if heat else None)


def size(png: bytes) -> tuple[int, int]:
    return Image.open(BytesIO(png)).size


def test_sheets_grow_with_their_rows_and_can_be_empty() -> None:
    one, two = (faces_sheet([Row("right", [face(k) for k in range(num)])], "age", 3) for num in (3, 4))
    tall = faces_sheet([Row("right", [face(k, heat=True) for k in range(3)])], "age", 3)

    assert size(one)[0] == size(two)[0] == size(tall)[0]
    assert size(one)[1] < size(tall)[1]
    assert size(one)[1] < size(two)[1]
    assert size(faces_sheet([Row("right", []), Row("wrong", [])], "age", 3))[0] == size(one)[0]
    assert size(pairs_sheet([Pair(face(0), face(1))] * 5, "alike"))[1] > size(pairs_sheet([], "alike"))[1]


def test_a_case_is_described_by_label_and_prediction() -> None:
    rgb = np.zeros((4, 4, 3), np.uint8)

    assert case_face(rgb, TRUTH, GUESS, "age", 3).text == "label 30\nmodel 70"
    assert case_face(rgb, TRUTH, GUESS, "gender", 2).text == "label male\nmodel female, 80%"
    assert case_face(rgb, TRUTH, GUESS, "race", 1).text == "label white\nmodel black, 60%"


def test_a_training_set_without_explain_is_rejected() -> None:
    with pytest.raises(ValueError, match="explain_train_data has no effect without explain"):
        EvaluateConfig(explain_train_data="data")
