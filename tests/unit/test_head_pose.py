"""Head pose as an input: what the heads see, and that training, evaluation and scoring all give it to them."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from agr_ray.config import ModelConfig, PredictConfig, TrainConfig, TrainJob
from agr_ray.data.crops import read_pose
from agr_ray.evaluation.metrics import Baseline
from agr_ray.labels import UTKFACE, Labels
from agr_ray.learn.context import LocalContext
from agr_ray.learn.loop import train
from agr_ray.models.head_pose import pose_features
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.transform import Transform
from agr_ray.predict.attributes import AttributePredictor

POSE = np.array([[45.0, 0.0, 0.0], [-45.0, 9.0, -90.0], [math.nan, 1.0, 2.0]], np.float32)
CROPS = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), np.uint8)


def network(*, head_pose: bool) -> MultiTaskNet:
    torch.manual_seed(0)
    config = ModelConfig(preset="lightweight", image_size=32, head_pose=head_pose)
    return MultiTaskNet(config, UTKFACE).eval()


def test_a_mirror_image_has_the_same_pose_and_an_unknown_pose_is_marked() -> None:
    expected = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.2, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(pose_features(POSE, torch.zeros(3, 7)), expected)
    mirrored = POSE * np.array([-1, 1, -1], np.float32)
    torch.testing.assert_close(pose_features(mirrored, torch.zeros(3, 7)), expected)
    assert not pose_features(None, torch.zeros(3, 7)).any()


def test_columns_without_a_pose_are_unknown() -> None:
    table = pa.table({"yaw": pa.array([1.0, None]), "pitch": pa.array([2.0, None]), "roll": pa.array([3.0, None])})
    np.testing.assert_array_equal(read_pose(table), np.array([[1, 2, 3], [math.nan] * 3], np.float32))


def test_predictions_follow_the_pose_of_each_face_only_with_head_pose() -> None:
    for head_pose in (False, True):
        predictor = AttributePredictor(network(head_pose=head_pose), Transform(32, 40), PredictConfig())
        with_pose, without = predictor.predict(CROPS, POSE)["gender"], predictor.predict(CROPS)["gender"]
        assert (with_pose != without).tolist() == ([True, True, False] if head_pose else [False] * 3)


def test_the_heads_alone_grow() -> None:
    plain, posed = (network(head_pose=head_pose).state_dict() for head_pose in (False, True))
    grown = [name for name in posed if posed[name].shape != plain[name].shape]
    assert grown == ["heads.age.layer.weight", "heads.gender.layer.weight", "heads.race.layer.weight"]
    assert [posed[name].shape[1] - plain[name].shape[1] for name in grown] == [4, 4, 4]


@pytest.mark.parametrize("is_known", [True, False])
def test_training_and_validation_give_the_pose_to_the_heads(is_known: bool) -> None:
    """Without decay, weights of an input that is always 0 do not change."""
    num, side = 16, 38
    rng = np.random.default_rng(0)
    data: dict[str, Any] = {
        "crop": rng.integers(0, 256, (num, side, side, 3), np.uint8),
        "gender": rng.integers(0, 2, num),
        "age": np.full(num, math.nan, np.float32),
        "race": np.full(num, -1),
        "pose": np.full((num, 3), 20.0 if is_known else math.nan, np.float32),
    }
    job = TrainJob(
        model=ModelConfig(preset="lightweight", image_size=32, head_pose=True, tasks=("gender",)),
        train=TrainConfig(epochs=1, batch_size=8, lr=0.1, optimizer="sgd", weight_decay=0.0, schedule="constant"),
    )
    torch.manual_seed(0)
    model = MultiTaskNet(job.model, UTKFACE)
    before = model.heads.state_dict()["gender.layer.weight"][:, -4:].clone()

    val = data | {"pose": np.full((num, 3), math.nan, np.float32)}
    metrics = []
    for validated in (data, val):
        trained = copy.deepcopy(model)
        context = LocalContext(data, validated, 8, on_report=lambda _: None)
        baseline = Baseline.fit(Labels.from_arrays(UTKFACE, data))
        (row,) = train(context, trained, Transform(32, 32), job, baseline, num)
        metrics.append(row["val_loss"])
        after = trained.heads.state_dict()["gender.layer.weight"][:, -4:]
        assert ((after != before).any(dim=0)).tolist() == [is_known] * 4
    assert (metrics[0] != metrics[1]) == is_known
