"""Trial records: the best trial, the Pareto front, the table, the recipe."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from agr_ray.config import ModelConfig, SourceConfig, TrainConfig, TrainJob, TrialError, TuneJob, VisionConfig, parse
from agr_ray.evaluation.groups import GroupSums, worst_group_age_mae
from agr_ray.evaluation.metrics import MetricSums, objective
from agr_ray.labels import UTKFACE, Labels
from agr_ray.schema import TRIALS
from agr_ray.tuning.recipe import recipe_toml
from agr_ray.tuning.trials import (
    EPOCH_COLUMNS,
    Trial,
    best_trial,
    error_names,
    excesses,
    front,
    is_feasible,
    trials_table,
)

TASKS = ("age", "gender", "race")


def epoch(number: int, objective: float, **errors: float | None) -> dict[str, Any]:
    return dict.fromkeys(EPOCH_COLUMNS, None) | {
        "epoch": number,
        "val_objective": objective,
        "val_balanced_objective": errors.get("judged", objective),
        "val_age_mae_years": errors.get("age", 6.0),
        "val_gender_balanced_accuracy": 1 - (errors.get("gender", 0.2) or 0),
        "val_race_balanced_accuracy": 1 - (errors.get("race", 0.4) or 0),
        "val_worst_group_age_mae_years": errors.get("worst", 9.0),
        "epoch_s": 1.0,
    }


def trial(number: int, objective: float, state: Any = "complete", **errors: float | None) -> Trial:
    return Trial(number, {"train.lr": 1e-3}, state, epochs=(epoch(1, objective, **errors),))


# Records


def test_a_trial_is_judged_by_the_epoch_whose_checkpoint_is_kept() -> None:
    record = Trial(0, {}, epochs=(epoch(1, 0.9, judged=0.5), epoch(2, 0.7, judged=0.8, age=5.0), epoch(3, 0.8)))

    assert record.objective == 0.8
    assert record.error("age_mae_years") == 5.0
    assert record.error("gender_error") == pytest.approx(0.2)
    assert record.curve == [0.5, 0.8, 0.8]


def test_an_epoch_that_is_reported_twice_counts_once() -> None:
    record = Trial(0, {}).with_epochs([epoch(1, 0.9), epoch(2, 0.8)]).with_epochs([epoch(2, 0.7) | {"lr": 1.0}])

    assert [row["val_objective"] for row in record.epochs] == [0.9, 0.7]
    assert list(record.epochs[1]) == list(EPOCH_COLUMNS)


def test_a_record_survives_json() -> None:
    record = Trial(3, {"train.lr": 1e-3, "x": "a"}, "failed", "raised: x", (epoch(1, 0.9),), ("one",), 2.5)

    assert Trial.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_a_history_without_the_newer_columns_can_be_read() -> None:
    record = Trial(0, {}).with_epochs([{"epoch": 1, "val_objective": 0.5}])

    assert record.objective is None
    assert best_trial([Trial(0, {}, "complete", epochs=record.epochs)], {}) is None


# The best trial


def test_the_best_trial_is_complete_and_the_first_among_equals() -> None:
    trials = [trial(0, 0.8), trial(1, 0.5, "pruned"), trial(2, 0.7), trial(3, 0.7), trial(4, 0.1, "failed")]

    best = best_trial(trials, {})
    assert best is not None
    assert best.number == 2
    assert best_trial([trials[1]], {}) is None


def test_a_constraint_comes_before_the_objective() -> None:
    trials = [trial(0, 0.5, worst=12.0), trial(1, 0.9, worst=7.0), trial(2, 0.4, worst=9.0)]

    assert excesses(trials[0], {"worst_group_age_mae_years": 8.0}) == {"worst_group_age_mae_years": 4.0}
    assert best_trial(trials, {"worst_group_age_mae_years": 8.0}) == trials[1]
    assert best_trial(trials, {"worst_group_age_mae_years": 6.0}) == trials[1]  # the least beyond
    assert best_trial(trials, {}) == trials[2]


def test_a_missing_metric_does_not_satisfy_a_constraint() -> None:
    assert not is_feasible(trial(0, 0.5, worst=None), {"worst_group_age_mae_years": 1e5})
    assert not is_feasible(Trial(0, {}), {"age_mae_years": 1e5})


def test_the_front_consists_of_trials_that_no_other_beats() -> None:
    trials = [
        trial(0, 0.9, age=5.0, gender=0.2, race=0.4),
        trial(1, 0.9, age=6.0, gender=0.1, race=0.4),
        trial(2, 0.9, age=6.0, gender=0.2, race=0.4),
        trial(3, 0.9, age=5.0, gender=0.2, race=0.4),
        trial(4, 0.1, "failed", age=1.0),
    ]

    assert [each.number for each in front(trials, {}, TASKS)] == [0, 1, 3]
    assert [each.number for each in front(trials, {"gender_error": 0.15}, TASKS)] == [1]
    assert [each.number for each in front(trials, {}, ("age", "race"))] == [0, 3]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trials = []
    for number in range(40):
        age, gender, race = rng.integers(0, 6, size=3) / 10  # few values: ties
        state = str(rng.choice(["complete", "complete", "pruned", "failed"]))
        race = None if rng.random() < 0.05 else race
        trials.append(trial(number, 0.5, state, age=age, gender=gender, race=race, worst=float(rng.random())))
    limits: dict[TrialError, float] = {"worst_group_age_mae_years": 0.8}

    def errors(each: Trial) -> list[float | None]:
        return [each.error(name) for name in error_names(TASKS)]

    usable = [each for each in trials if each.state == "complete" and is_feasible(each, limits) and each.kept]
    usable = [each for each in usable if None not in errors(each)]
    expected = [
        each.number
        for each in usable
        if not any(
            errors(other) != errors(each) and all(o <= e for o, e in zip(errors(other), errors(each), strict=True))  # type: ignore[operator]
            for other in usable
        )
    ]

    assert [each.number for each in front(trials, limits, TASKS)] == expected


# The table


def test_the_table_has_a_column_for_each_searched_key() -> None:
    space = TuneJob(
        train={"data": "d"},
        tune={
            "space": {
                "train.lr": {"log_uniform": [1e-4, 1e-2]},
                "train.batch_size": {"integer": [8, 64]},
                "train.optimizer": {"choice": ["adam", "sgd"]},
                "train.use_fallback": {"choice": [True, False]},
            }
        },
    ).tune.space
    rows = [
        Trial(1, {"train.lr": 1e-3, "train.batch_size": 16, "train.optimizer": "sgd"}, "pruned", "late"),
        Trial(0, {"train.use_fallback": False}, "complete", epochs=(epoch(1, 0.5),), wall_s=3.0),
    ]

    table = trials_table(rows, space, {}, TASKS)

    assert table.schema.names == [*TRIALS.names, *space]
    assert [table.schema.field(key).type for key in space] == [pa.float64(), pa.int64(), pa.string(), pa.bool_()]
    assert table["number"].to_pylist() == [0, 1]
    assert table["train.optimizer"].to_pylist() == [None, "sgd"]
    assert table["is_best"].to_pylist() == [True, False]
    assert table["state"].to_pylist() == ["complete", "pruned"]


# The recipe


def test_a_recipe_gives_the_same_job_again(tmp_path: Path) -> None:
    job = TrainJob(
        model=ModelConfig(backbone="resnet18", age_head="distribution", image_size=88),
        train=TrainConfig(
            data=["/a,b", 'c "d" \\'], data_shares=(3, 1), lr=1e-05, num_workers=[2, 4], image_sizes=[64, 88]
        ),
    )
    path = tmp_path / "best.toml"
    sections = {name: getattr(job, name) for name in ("model", "loss", "augment", "train", "predict")}
    path.write_text(recipe_toml({"vision": VisionConfig(), **sections}, ["a head"], ["train.mlflow_uri"]))

    assert parse(TrainJob, ["--config", str(path)], {}).model_dump() == job.model_dump()
    assert "mlflow_uri" not in tomllib.loads(path.read_text())["train"]
    assert path.read_text().startswith("# a head\n\n[vision]\n")


def test_a_recipe_quotes_values_that_toml_would_misread() -> None:
    said = SourceConfig(name='tab\tline\nquote"DEL\x7fü', gender_codes={"M.1": "male", "F": "female"})

    assert SourceConfig(**tomllib.loads(recipe_toml({"source": said}))["source"]) == said


# The objective


def test_the_balanced_objective_counts_each_class_the_same() -> None:
    # Ten women of whom all are right, two men of whom one is: accuracy 11/12, balanced 3/4.
    genders = np.array([0] * 10 + [1] * 2)
    p_male = np.array([0.0] * 10 + [1.0, 0.0], np.float32)
    labels = Labels(UTKFACE, np.full(12, np.nan, np.float32), genders, np.full(12, -1))
    sums, guesses = MetricSums(UTKFACE), MetricSums(UTKFACE)
    sums.update(labels, {"gender": p_male})
    guesses.update(labels, {"gender": np.zeros(12, np.float32)})

    plain = objective(sums.to_json(), guesses.to_json(), ("gender",))
    balanced = objective(sums.to_json(), guesses.to_json(), ("gender",), balanced=True)

    assert plain == pytest.approx((1 / 12) / (2 / 12))
    assert balanced == pytest.approx(0.25 / 0.5)


def test_the_worst_group_is_never_a_small_one() -> None:
    # Thirty women off by 2 years, ten men by 4, three more, of a race of their own, by 20.
    genders = np.array([0] * 30 + [1] * 13)
    races = np.array([0] * 40 + [2] * 3)
    ages = np.full(43, 30.0, np.float32)
    guessed = ages + np.array([2.0] * 30 + [4.0] * 10 + [20.0] * 3, np.float32)
    groups = GroupSums(UTKFACE)
    groups.update(Labels(UTKFACE, ages, genders, races), {"age": guessed})

    assert worst_group_age_mae(groups.to_json()) == pytest.approx((10 * 4 + 3 * 20) / 13)
    assert worst_group_age_mae(GroupSums(UTKFACE).to_json()) is None
