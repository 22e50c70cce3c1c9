"""Two models on the same images: paired differences overall and by group, and `agr-ray evaluate --compare A B`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from agr_ray.config import EvaluateConfig, EvaluateJob, parse
from agr_ray.errors import ConfigError
from agr_ray.evaluation.comparison import METRICS, compare_pair
from agr_ray.evaluation.disparities import MIN_ROWS
from agr_ray.labels import FAIRFACE, GENDERS, UTKFACE, Labels, LabelSpace
from agr_ray.models.predictions import Predictions
from agr_ray.predict.crop_predictor import prediction_columns
from agr_ray.report.evaluation_pair import pair_json, write_pair
from agr_ray.runtime.evaluate import evaluate
from agr_ray.schema import PREDICTIONS
from agr_ray.storage import Storage

NUM = 2400
RNG = np.random.default_rng(0)
LABELS = Labels(
    UTKFACE,
    RNG.integers(1, 90, NUM).astype(np.float32),
    RNG.integers(0, 2, NUM),
    np.repeat([0, 1, 2, 3, 4], [1200, 500, 400, 290, 10]),
)
PERSONS = np.arange(NUM) // 2


def model(seed: int, error_years: float = 6.0, share_right: float = 0.85) -> Predictions:
    """Return predictions of a model with independent errors."""
    rng = np.random.default_rng(seed)
    is_right = rng.random((2, NUM)) < share_right
    return {
        "age": (LABELS.age + rng.normal(0, error_years, NUM)).clip(0, 116).astype(np.float32),
        "gender": np.where(is_right[0], LABELS.gender, 1 - LABELS.gender).astype(np.float32),
        "race": np.eye(5, dtype=np.float32)[np.where(is_right[1], LABELS.race, (LABELS.race + 1) % 5)],
    }


def compared(first: Predictions, second: Predictions, **options: Any) -> dict[str, Any]:
    return pair_json(compare_pair(first, second, LABELS, PERSONS, **options))


def test_a_model_differs_nowhere_from_itself() -> None:
    found = compared(model(1), model(1))

    assert [(each["difference"], each["interval"]) for each in found["metrics"].values()] == [(0.0, [0.0, 0.0])] * 5
    assert found["verdict"] == [
        "Overall, these images show no difference between the two models.",
        "In no group do these images show a difference.",
    ]
    assert {
        each["better"] for of in found["groups"].values() for group in of.values() for each in metrics_of(group)
    } == {None}


def metrics_of(group: dict[str, Any]) -> list[dict[str, Any]]:
    return [value for name, value in group.items() if name != "n"]


def test_a_difference_overall_is_found_with_its_size() -> None:
    first = model(1)
    second = dict(first) | {"age": (LABELS.age + 0.8 * (first["age"] - LABELS.age)).astype(np.float32)}
    found = compared(first, second)

    age = found["metrics"]["age_mae_years"]
    errors = [np.abs(each["age"].astype(np.float64) - LABELS.age).mean() for each in (first, second)]
    assert (age["first"], age["second"]) == pytest.approx(errors)
    assert age["difference"] == pytest.approx(errors[1] - errors[0])
    assert age["interval"][0] < age["difference"] < age["interval"][1] < 0.0
    assert age["adjusted_interval"][0] < age["interval"][0]
    assert age["better"] == "second"
    assert found["metrics"]["race_accuracy"]["better"] is None
    assert found["verdict"][0] == f"age MAE: the second model is better by {errors[0] - errors[1]:.2f} years"


def test_a_difference_in_one_group_is_found_there_and_in_no_disjoint_group() -> None:
    """The second model mistakes one man in three of race `asian`, and is otherwise the first."""
    first = model(1)
    hit = (LABELS.race == 2) & (LABELS.gender == 1) & (np.arange(NUM) % 3 == 0)
    second = dict(first) | {"gender": np.where(hit, 0.0, first["gender"]).astype(np.float32)}
    groups = compared(first, second)["groups"]

    own = groups["gender_race"]["male/asian"]
    right = [(each["gender"] > 0.5)[(LABELS.race == 2) & (LABELS.gender == 1)].mean() for each in (first, second)]
    assert own["gender_accuracy"]["difference"] == pytest.approx(right[1] - right[0])
    assert own["gender_accuracy"]["better"] == "first"
    better = {name: group["gender_accuracy"]["better"] for name, group in (groups["race"] | groups["gender"]).items()}
    assert better == {"white": None, "black": None, "asian": "first", "indian": None, "female": None, "male": "first"}


def test_small_groups_are_counted_and_not_compared() -> None:
    paired = compare_pair(model(1), model(2), LABELS, PERSONS)
    assert paired.num_rows["race"]["others"] == 10 < MIN_ROWS
    assert list(paired.groups["race"]) == ["white", "black", "asian", "indian"]
    num_groups = sum(len(members) for members in paired.groups.values())
    assert paired.num_comparisons == len(METRICS) * num_groups
    assert paired.num_units == NUM / 2


@pytest.mark.slow
def test_equally_good_models_rarely_differ_anywhere() -> None:
    """Thirty pairs, of which 5 % may differ overall and 5 % in some group."""
    num_overall, num_in_groups = 0, 0
    for seed in range(30):
        found = compared(model(2 * seed), model(2 * seed + 1), num_resamples=100, seed=seed)
        num_overall += any(each["better"] for each in found["metrics"].values())
        groups = [group for of in found["groups"].values() for group in of.values()]
        num_in_groups += any(each["better"] for group in groups for each in metrics_of(group))
    assert num_overall <= 5  # the probability of more, at 5 %, is 0.3 %
    assert num_in_groups <= 5


# Files


def write_evaluation(
    folder: Path,
    guess: Predictions,
    labels: Labels = LABELS,
    space: LabelSpace = UTKFACE,
    keep: slice = slice(None),
    tasks: tuple[str, ...] = ("age", "gender", "race"),
) -> str:
    """Write the parts of an evaluation that a comparison reads, in an order of its own."""
    num = len(labels)
    columns = prediction_columns({task: guess[task] for task in tasks}, num, space)
    names = [f"image-{number}" for number in range(num)]
    columns |= {
        "image_id": pa.array(names),
        "group_id": pa.array([f"person-{person}" for person in PERSONS]),
        "age": pa.array(labels.age, from_pandas=True),
        "gender": pa.array([None if code < 0 else GENDERS[code] for code in labels.gender]),
        "race": pa.array([None if code < 0 else space.races[code] for code in labels.race]),
        "status": pa.array(["ok"] * num),
    }
    nothing = {field.name: pa.nulls(num, field.type) for field in PREDICTIONS}
    table = pa.table(nothing | columns)
    shuffled = table.take(np.random.default_rng(len(str(folder))).permutation(num)[keep])
    record = {
        "checkpoint": f"{folder.name}.ckpt", "model_digest": folder.name, "data": "faces", "split": "test",
        "split_manifest_sha256": "00", "tasks": list(tasks), "label_space": space.to_json(),
    }  # fmt: skip
    folder.mkdir()
    Storage().write_table(shuffled, str(folder / "predictions.parquet"))
    names_of = {"age_group": list(space.age_groups), "race": list(space.races), "gender": list(GENDERS)}
    (folder / "metrics.json").write_text(json.dumps({"labels": names_of, "evaluation": record}))
    return str(folder)


def test_two_evaluations_are_compared_from_their_files(tmp_path: Path) -> None:
    first = model(1)
    better = dict(first) | {"age": (LABELS.age + 0.8 * (first["age"] - LABELS.age)).astype(np.float32)}
    uris = [write_evaluation(tmp_path / "a", first), write_evaluation(tmp_path / "b", better, keep=slice(0, NUM - 100))]
    output = io.StringIO()
    content = write_pair(Storage(), *uris, str(tmp_path / "out"), Console(file=output, width=120))

    assert json.loads((tmp_path / "out" / "paired.json").read_text()) == content
    assert (content["n"], content["n_first_only"], content["n_second_only"]) == (NUM - 100, 100, 0)
    assert (content["first"]["checkpoint"], content["second"]["evaluation"]) == ("a.ckpt", uris[1])
    assert content["metrics"]["age_mae_years"]["better"] == "second"
    assert content["num_units"] > 1000
    shown = output.getvalue()
    assert content["verdict"][0] in shown
    assert "2,300 images in both evaluations; left out: 100 of the first only" in " ".join(shown.split())


def test_without_out_the_file_is_beside_the_first_evaluation(tmp_path: Path) -> None:
    uris = [write_evaluation(tmp_path / name, model(1)) for name in "ab"]
    job = EvaluateJob(evaluate=EvaluateConfig(compare=json.dumps(uris)))
    content = evaluate(job, quiet=True)

    (written,) = tmp_path.glob("a-against-*/paired.json")
    assert json.loads(written.read_text())["verdict"] == content["verdict"]
    assert len(content["verdict"]) == 2


def test_races_of_two_spaces_are_not_compared(tmp_path: Path) -> None:
    seven = dict(model(1)) | {"race": np.full((NUM, 7), 1 / 7, np.float32)}
    uris = [write_evaluation(tmp_path / "a", model(1)), write_evaluation(tmp_path / "b", seven, space=FAIRFACE)]
    output = io.StringIO()
    content = write_pair(Storage(), *uris, "", Console(file=output, width=120))

    assert "race is not compared, because the races of the two label spaces differ" in output.getvalue()
    assert content["tasks"] == ["age", "gender"]
    assert list(content["metrics"]) == ["age_mae_years", "age_within_5", "age_one_off", "gender_accuracy"]
    assert content["groups"]["race"] == {}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"keep": slice(0, 0)}, "have no image in common"),
        ({"tasks": ("race",)}, "have no task in common"),
        (
            {"labels": Labels(UTKFACE, LABELS.age + (np.arange(NUM) < 3), LABELS.gender, LABELS.race)},
            "the age of 3 images differs between .* evaluate both models on the same prepared set",
        ),
    ],
)
def test_evaluations_that_can_not_be_compared_are_rejected(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    first = write_evaluation(tmp_path / "a", model(1), tasks=("age", "gender"))
    second = write_evaluation(tmp_path / "b", model(1), **change)
    with pytest.raises(ConfigError, match=f"^evaluate.compare: .*{problem}"):
        write_pair(Storage(), first, second, "", Console(quiet=True))


def test_an_older_evaluation_must_be_repeated(tmp_path: Path) -> None:
    uri = write_evaluation(tmp_path / "a", model(1))
    (tmp_path / "a" / "metrics.json").write_text('{"evaluation": {"label_space": "utkface"}, "labels": {}}')
    with pytest.raises(
        ConfigError, match=r"a: its metrics\.json is not of this version; evaluate the checkpoint again"
    ):
        write_pair(Storage(), uri, uri, "", Console(quiet=True))


def test_a_folder_that_is_neither_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    job = EvaluateJob(evaluate=EvaluateConfig(compare=json.dumps([str(tmp_path / "empty")] * 2)))
    with pytest.raises(
        ConfigError, match=r"^evaluate\.compare .*empty: neither a checkpoint, which has meta\.json, nor"
    ):
        evaluate(job, quiet=True)
    (tmp_path / "empty" / "meta.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"^evaluate\.data is needed, because evaluate\.compare .*empty is a checkpoint"
    ):
        evaluate(job, quiet=True)


# The command line


@pytest.mark.parametrize(
    "words",
    [["--compare", "a", "b,c"], ["--compare", "a", "--compare", "b,c"], ["--evaluate.compare", '["a", "b,c"]']],
)
def test_compare_takes_two_words(words: list[str]) -> None:
    config = parse(EvaluateJob, [*words, "--split", "val"], {}).evaluate
    assert (config.compared, config.split) == (("a", "b,c"), "val")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--compare", "a"], "evaluate: compare must name two models, as in --compare A B; found 1"),
        (["--compare", "a", "b", "c"], "evaluate: compare must name two models, as in --compare A B; found 3"),
        (["--compare", "a", "b", "--checkpoint", "c"], "evaluate: compare and checkpoint exclude each other"),
        (["--compare", "a", "b", "--calibrate"], "evaluate: compare and calibrate exclude each other"),
        (["--data", "d"], "evaluate.checkpoint is needed"),
        (
            ["--checkpoint", "c", "--data", "d", "--age_thresholds", "18,18"],
            r"age_thresholds \[18, 18\] must be distinct",
        ),
    ],
)
def test_other_combinations_are_rejected(words: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(EvaluateJob, words, {})
