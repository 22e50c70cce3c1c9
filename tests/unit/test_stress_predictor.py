"""The units of a stress test, its folder and its figure."""

from __future__ import annotations

import re
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from agr_ray.config import EvaluateConfig, ModelConfig, PredictConfig
from agr_ray.data.crops import read_images
from agr_ray.data.rendered import render_chip
from agr_ray.errors import ConfigError
from agr_ray.evaluation.robustness import Condition, measure, measure_yaw, stress_rows
from agr_ray.labels import UTKFACE, Labels
from agr_ray.models.checkpoint_files import portable_checkpoint
from agr_ray.models.checkpoint_network import save_checkpoint
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.transform import Transform
from agr_ray.predict import stress_predictor
from agr_ray.predict.stress_folder import StressFolder
from agr_ray.predict.stress_predictor import (
    SAMPLE_COLUMNS,
    StressPredictor,
    Unit,
    conditions_of,
    crop_landmarks,
    level_text,
    sampled_ids,
    units_of,
)
from agr_ray.report.stress import print_stress, stress_figure
from agr_ray.runtime.stress import check_corruptions
from agr_ray.schema import CROPS, STRESS_PREDICTIONS
from agr_ray.storage import Storage
from agr_ray.vision.align import align_chip, align_face
from agr_ray.vision.corruptions import CORRUPTIONS
from agr_ray.vision.decode import encode_jpeg

SIDE_PX = 32
LANDMARKS = [20.0, 20.0, 60.0, 24.0, 40.0, 40.0, 22.0, 62.0, 58.0, 66.0]


def crop_rows(num_rows: int) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for index in range(num_rows):
        rgb, has_face = render_chip(0, index).image_rgb, index % 2 == 0
        points = np.array(LANDMARKS).reshape(5, 2)
        crop = align_face(rgb, points, SIDE_PX) if has_face else align_chip(rgb, SIDE_PX)
        rows.append(
            {
                "image_id": f"image {index}",
                "uri": "",
                "key": "",
                "source": "",
                "status": "ok" if has_face else "fallback",
                "crop": encode_jpeg(crop),
                "landmarks": LANDMARKS if has_face else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=CROPS)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> StressPredictor:
    folder = tmp_path_factory.mktemp("stress")
    torch.manual_seed(0)
    model = MultiTaskNet(ModelConfig(backbone="mobilenet_v3_small", image_size=SIDE_PX), UTKFACE)
    model.initialise({"age": np.array([20.0, 60.0])})
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # so that predictions differ between images
    with torch.no_grad():
        model.train()(torch.randn(8, 3, SIDE_PX, SIDE_PX))
    save_checkpoint(folder / "model", model, Transform(SIDE_PX, SIDE_PX))
    Storage().write_table(crop_rows(6), str(folder / "crops.parquet"))
    image_ids = [f"image {k}" for k in (1, 2, 4, 5)]
    sample = read_images(Storage(), [str(folder / "crops.parquet")], image_ids, SAMPLE_COLUMNS)
    return StressPredictor(sample, portable_checkpoint(folder / "model"), SIDE_PX, 0, PredictConfig(), "cpu")


def test_a_unit_is_predicted_in_the_order_of_the_sample(predictor: StressPredictor) -> None:
    table = predictor.predict(Unit(Condition("noise", 5), 0))

    assert table.schema.equals(STRESS_PREDICTIONS)
    assert table["image_id"].to_pylist() == ["image 1", "image 2", "image 4", "image 5"]
    assert len(set(table["p_male"].to_pylist())) == 4


def test_conditions_differ_and_can_be_repeated(predictor: StressPredictor) -> None:
    units = [Unit(Condition(name, severity), 0) for name, severity in (("noise", 1), ("noise", 5), ("mask", 5))]
    first, second = ([predictor.predict(unit) for unit in units] for _ in range(2))

    assert all(one.equals(other) for one, other in zip(first, second, strict=True))
    assert len({tuple(table["p_male"].to_pylist()) for table in first}) == 3


def test_an_image_is_predicted_alike_in_any_unit(predictor: StressPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = predictor.predict(Unit(Condition("patch", 4), 0))
    monkeypatch.setattr(stress_predictor, "UNIT_ROWS", 3)
    units = units_of([Condition("patch", 4)], 4)

    assert [unit.first for unit in units] == [0, 3]
    assert pa.concat_tables([predictor.predict(unit) for unit in units]).equals(whole)


def test_landmarks_of_crops_are_near_the_template_and_nan_without_a_face() -> None:
    points = crop_landmarks(crop_rows(2), SIDE_PX)

    assert points.shape == (2, 5, 2)
    assert np.isnan(points[1]).all()
    np.testing.assert_allclose(points[0, :2].mean(axis=0), [19.2, 0.29 * SIDE_PX + 3], atol=1.5)


def test_all_corruptions_have_five_conditions_each() -> None:
    assert len(conditions_of(())) == 5 * len(CORRUPTIONS)
    assert conditions_of(("webcam", "blur"))[4:6] == [Condition("blur", 5), Condition("webcam", 1)]


def test_units_cover_every_image_of_every_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stress_predictor, "UNIT_ROWS", 10)
    conditions = conditions_of(("blur",))

    assert units_of(conditions, 25) == [Unit(each, first) for each in conditions for first in (0, 10, 20)]


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        (Condition("resolution", 5), "16 px of the face"),
        (Condition("jpeg", 1), "quality 40"),
        (Condition("underexposure", 3), "-3 stops"),
        (Condition("overexposure", 1), "+0.5 stops"),
        (Condition("rotation", 2), "20 degrees"),
        (Condition("patch", 5), "0.4 of the area"),
    ],
)
def test_levels_in_words(condition: Condition, text: str) -> None:
    assert level_text(condition) == text


def test_a_sample_does_not_depend_on_the_order_and_a_smaller_one_is_part_of_it() -> None:
    names = [f"image {k}" for k in range(1000)]
    large, small = sampled_ids(names, 400, 0), sampled_ids(names[::-1], 100, 0)

    assert (len(large), len(small), large == sorted(large)) == (400, 100, True)
    assert set(small) <= set(large)
    assert sampled_ids(names, 100, 1) != small
    assert sampled_ids(names, 5000, 0) == sorted(names)


def predicted(image_ids: list[str]) -> pa.Table:
    return pa.Table.from_pylist([{"image_id": image_id, "age_pred": 1.0} for image_id in image_ids], STRESS_PREDICTIONS)


def test_complete_conditions_survive_and_those_of_another_plan_do_not(tmp_path: Path) -> None:
    folder = StressFolder(Storage(), str(tmp_path / "stress"))
    conditions = [Condition("blur", 1), Condition("blur", 2)]
    assert folder.begin({"model": "a"}) is False
    folder.write(conditions[1], [predicted(["b"]), predicted(["a"])])

    assert folder.begin({"model": "a"}) is False
    assert folder.complete(conditions) == [conditions[1]]
    assert folder.read(conditions[1])["image_id"].to_pylist() == ["a", "b"]
    assert folder.begin({"model": "b"}) is True
    assert folder.complete(conditions) == []


def test_files_without_a_plan_are_not_trusted(tmp_path: Path) -> None:
    folder = StressFolder(Storage(), str(tmp_path / "stress"))
    folder.write(Condition("blur", 1), [predicted(["a"])])

    assert folder.begin({"model": "a"}) is True
    assert folder.complete([Condition("blur", 1)]) == []


def test_an_unknown_corruption_is_named_before_work_starts() -> None:
    with pytest.raises(ConfigError, match=r"^evaluate\.stress_corruptions fog: .*resolution, blur"):
        check_corruptions(EvaluateConfig(stress=True, stress_corruptions=("blur", "fog")))
    with pytest.raises(ValueError, match="has no effect without stress"):
        EvaluateConfig(stress_corruptions=("blur",))


def result(num_images: int = 40, *, has_gender: bool = True) -> tuple[Any, list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    gender = rng.integers(0, 2, num_images) if has_gender else np.full(num_images, -1)
    labels = Labels(UTKFACE, rng.uniform(0, 80, num_images).astype(np.float32), gender, np.full(num_images, -1))

    def guess(scale: float) -> dict[str, NDArray[np.float32]]:
        age = labels.age + rng.normal(0, scale, num_images)
        return {"age": age.astype(np.float32), "gender": rng.random(num_images).astype(np.float32)}

    conditions = conditions_of(("blur", "noise", "mask"))
    robustness = measure(
        labels, guess(3), {each: guess(3 * each.severity) for each in conditions}, np.arange(num_images)
    )
    yaw = measure_yaw(labels, guess(3), rng.normal(0, 20, num_images), np.arange(num_images))
    return robustness, stress_rows(robustness, yaw, {each: level_text(each) for each in conditions})


def test_the_figure_has_a_row_for_each_metric_and_a_column_for_each_family() -> None:
    _, rows = result()
    figure = stress_figure(rows, {"age_mae_years": 15.0}, "set $1, split test")
    body = BytesIO()
    figure.savefig(body, format="png")

    assert [axes.get_title() for axes in figure.axes[:4]] == [
        "optics",
        "sensor",
        "occlusion",
        "head pose (clean images)",
    ]
    assert [axes.get_ylabel() for axes in figure.axes[::4]] == [
        "age MAE, years",
        "age bias, years",
        "age within 5 years, %",
        "gender accuracy, %",
    ]
    (curve, baseline) = figure.axes[0].get_lines()
    assert curve.get_ydata()[0] == rows[0]["age_mae_years"]
    assert curve.get_ydata()[5] == next(row for row in rows if row["severity"] == 5)["age_mae_years"]
    assert list(baseline.get_ydata()) == [15.0, 15.0]
    assert Image.open(body).size[0] > 1000


def test_the_table_names_the_worst_condition() -> None:
    robustness, _ = result(has_gender=False)
    printed = StringIO()
    print_stress(Console(width=200, file=printed), robustness, "out")
    text = " ".join(printed.getvalue().split())

    assert "gender" not in text
    assert re.search(r"│ clean │ \d+\.\d+ \(\d+\.\d+ to \d+\.\d+\) │", text)
    assert re.search(r"worst age MAE: \d+\.\d+ years \((blur, 0\.045|noise, 0\.22|mask, 0\.7) of ", text)
