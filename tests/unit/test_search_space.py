"""A sweep's search space: checks before anything starts, and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from agr_ray.config import ParameterConfig, TuneConfig, TuneJob, parse
from agr_ray.errors import ConfigError
from agr_ray.tuning.space import (
    base_job,
    check_space,
    distribution_of,
    is_papers,
    points,
    suggest,
    unlike_papers,
    values_of,
    with_values,
)

LR = {"log_uniform": [1e-4, 1e-2]}
OPTIMIZER = {"choice": ["adam", "sgd"]}


def tune_job(space: dict[str, Any], train: dict[str, Any] | None = None, **changes: Any) -> TuneJob:
    return TuneJob(train={"data": "somewhere"} | (train or {}), tune={"space": space, **changes})


def refused(space: dict[str, Any], train: dict[str, Any] | None = None, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check_space(tune_job(space, train, **changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def parsed(tmp_path: Path, text: str, *argv: str) -> TuneJob:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return parse(TuneJob, ["--config", str(path), "--train.data", "somewhere", *argv], {})


# Recipes


def test_a_recipe_of_every_kind_is_read(tmp_path: Path) -> None:
    job = parsed(
        tmp_path,
        """
        [tune]
        constraints = {worst_group_age_mae_years = 8}
        [tune.space]
        "loss.age_weight" = {uniform = [0, 2], step = 0.5}
        "train.lr" = {log_uniform = [1e-4, 1e-2]}
        "train.batch_size" = {integer = [32, 128], step = 32}
        "train.optimizer" = {choice = ["adam", "sgd"]}
        "train.weight_decay" = {log_uniform = [1e-4, 1e-1], when = {"train.optimizer" = "sgd"}}
        [[tune.points_to_evaluate]]
        "train.lr" = 3e-3
        """,
        "--add",
        "20",
    )

    check_space(job)
    assert job.add == 20
    assert list(job.tune.space)[-1] == "train.weight_decay"
    assert job.tune.points_to_evaluate == ({"train.lr": 3e-3},)


def test_the_command_line_adds_to_the_space(tmp_path: Path) -> None:
    job = parsed(
        tmp_path,
        '[tune.space]\n"train.lr" = {log_uniform = [1e-4, 1e-2]}\n',
        "--tune.space",
        '{"loss.age_weight": {"uniform": [0, 1]}}',
    )

    assert list(job.tune.space) == ["train.lr", "loss.age_weight"]


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ("{uniform = [1, 0]}", "uniform [1, 0]: the first must be less than the second"),
        ("{uniform = [0, 1], choice = [1, 2]}", "not uniform and choice"),
        ("{}", "exactly one of uniform, log_uniform, integer, choice is needed, not none"),
        ("{unifrom = [0, 1]}", "there is no such key; did you mean uniform?"),
        ("{choice = [1]}", "choice [1] needs at least two distinct values"),
        ("{choice = [1, 1]}", "at least two distinct values"),
        ("{log_uniform = [0, 1]}", "0 is not allowed"),
        ("{log_uniform = [1e-3, 1], step = 0.1}", "step 0.1 is for uniform and integer only"),
        ("{integer = [1, 4], step = 0.5}", "step 0.5 of an integer must be whole"),
        ("{integer = [1, 4], step = 5}", "step 5 is more than integer [1, 4] is wide"),
    ],
)
def test_an_invalid_parameter_is_rejected(tmp_path: Path, parameter: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(tmp_path, f'[tune.space]\n"train.lr" = {parameter}\n')

    assert str(error.value).startswith("tune.space.train.lr")
    assert said in str(error.value)


def test_a_sweep_without_a_space_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"tune\.space is needed"):
        parse(TuneJob, ["--train.data", "somewhere"], {})


@pytest.mark.parametrize("study", ["s3://bucket/a.journal", "study.db"])
def test_a_study_that_can_not_be_locked_is_rejected(tmp_path: Path, study: str) -> None:
    with pytest.raises(ConfigError, match=r"must be a local file whose name ends in \.journal, or a database URL"):
        parsed(tmp_path, '[tune.space]\n"train.lr" = {log_uniform = [1e-4, 1e-2]}\n', "--tune.study", study)


# Against the configuration


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"train.learning_rate": LR}, 'tune.space."train.learning_rate": there is no such key; allowed in [train]:'),
        ({"score.batch_size": LR}, "can't be searched; allowed: model.*, loss.*"),
        ({"train.num_workers": {"integer": [1, 2]}}, "the number of concurrent trials depends on it"),
        ({"model.tasks": {"choice": [["age"], ["age", "race"]]}}, "objectives of other tasks can't be compared"),
        ({"train.lock_expiry_s": {"uniform": [1, 2]}}, "it does not affect what is learnt"),
        ({"train.tf32": {"choice": [True, False]}}, "it does not affect what is learnt"),
        ({"train.compile": {"choice": [True, False]}}, "it does not affect what is learnt"),
        ({"train.epochs": {"integer": [2, 8]}}, "can't be searched if trials are stopped early"),
        ({"model.preset": {"choice": ["paper", "lightweight"]}}, "such as model.backbone"),
        ({"loss.age_weight": {"uniform": [-1, 2]}}, 'tune.space."loss.age_weight": -1.0 is not allowed'),
        ({"model.dropout": {"uniform": [0, 1]}}, 'tune.space."model.dropout": 1.0 is not allowed'),
        ({"train.epochs": {"uniform": [2, 8]}}, 'tune.space."train.epochs": 5.7'),
        ({"train.optimizer": {"choice": ["adam", "lion"]}}, "'lion' is not allowed: input should be 'adam', 'adamw'"),
        (
            {"train.balance": {"choice": ["none", "race"]}}
            | {"train.balance_power": {"uniform": [0, 2], "when": {"train.balance": "race"}}},
            'tune.space."train.balance_power": 1.2360679774 is not allowed',
        ),
        ({"train.batch_size": {"integer": [1, 64]}}, "train.batch_size 1 is too small"),
        ({"model.image_size": {"choice": [64, 96]}}, "96 can't be combined with the recipe"),
    ],
)
def test_bounds_and_choices_are_checked_in_the_configuration(space: dict[str, Any], said: str) -> None:
    model = {"image_size": 64} if "model.image_size" in space else {}
    train = {"data": "somewhere", "image_sizes": [64] if model else []}
    job = TuneJob(model=model, train=train, tune={"space": space, "paper_first": False})

    with pytest.raises(ConfigError) as error:
        check_space(job)

    assert said in str(error.value)


def test_a_condition_holds_while_a_bound_is_tried() -> None:
    # 5 epochs are too many for the recipe's early stopping, but not where the schedule is another.
    space = {
        "train.schedule": {"choice": ["plateau", "constant"]},
        "train.plateau_epochs": {"integer": [2, 20], "when": {"train.schedule": "constant"}},
    }

    check_space(tune_job(space, {"early_stopping_patience": 10}))

    space["train.plateau_epochs"]["when"] = {"train.schedule": "plateau"}
    assert "plateau_epochs 20 must be less than early_stopping_patience 10" in refused(
        space, {"early_stopping_patience": 10}
    )


@pytest.mark.parametrize(
    ("when", "said"),
    [
        (
            {"train.momentum": 1},
            "when names train.momentum, which is not searched; searched: train.lr, train.optimizer",
        ),
        ({"train.optimizer": "adamw"}, "when: train.optimizer 'adamw' is not in choice ['adam', 'sgd']"),
        ({"train.lr": 1e-3}, "depend on each other in a circle"),
    ],
)
def test_a_condition_that_never_holds_is_rejected(when: dict[str, Any], said: str) -> None:
    assert said in refused({"train.lr": LR | {"when": when}, "train.optimizer": OPTIMIZER})


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({"train.momentum": 1.0}, "train.momentum is not searched"),
        ({"train.lr": 1.0}, "train.lr 1.0 is not in log_uniform [0.0001, 0.01]"),
        ({"train.batch_size": 40}, "train.batch_size 40 is not 32 and a multiple of step 32"),
        ({"train.batch_size": 64.0}, "train.batch_size 64.0 is not in integer [32, 128]"),
        ({"train.optimizer": "adamw"}, "train.optimizer 'adamw' is not in choice"),
    ],
)
def test_a_point_outside_the_space_is_rejected(point: dict[str, Any], said: str) -> None:
    space = {"train.lr": LR, "train.batch_size": {"integer": [32, 128], "step": 32}, "train.optimizer": OPTIMIZER}

    assert refused(space, points_to_evaluate=[point]).startswith("tune.points_to_evaluate: ")
    assert said in refused(space, points_to_evaluate=[point])


def test_a_point_is_checked_as_a_whole() -> None:
    space = {
        "train.schedule": {"choice": ["plateau", "step"]},
        "train.plateau_epochs": {"integer": [5, 15]},
        "train.gamma": {"uniform": [0.1, 0.9], "when": {"train.schedule": "plateau"}},
    }
    point = {"train.schedule": "plateau", "train.plateau_epochs": 12}

    said = refused(space, points_to_evaluate=[point])

    assert "train.schedule plateau, train.plateau_epochs 12 can't be combined with the recipe: " in said
    assert "plateau_epochs 12 must be less than early_stopping_patience 10" in said
    check_space(tune_job(space, points_to_evaluate=[{**point, "train.schedule": "step"}]))
    # What a value depends on is drawn, so that it means something.
    assert "train.gamma 0.5" in refused(space, points_to_evaluate=[{"train.gamma": 0.5, "train.plateau_epochs": 12}])


def test_a_point_may_have_lists(tmp_path: Path) -> None:
    job = parsed(
        tmp_path,
        """
        [tune]
        paper_first = false
        [tune.space]
        "train.image_sizes" = {choice = [[64, 224], [224]]}
        [[tune.points_to_evaluate]]
        "train.image_sizes" = [64, 224]
        """,
    )

    check_space(job)
    assert points(job.tune) == [{"train.image_sizes": "[64, 224]"}]


def test_constraints_on_absent_tasks_are_rejected() -> None:
    constraints = {"gender_error": 0.1, "worst_group_age_mae_years": 8}
    job = TuneJob(
        model={"tasks": ["gender"]}, train={"data": "d"}, tune={"space": {"train.lr": LR}, "constraints": constraints}
    )

    with pytest.raises(ConfigError, match=r"tune\.constraints worst_group_age_mae_years needs the task age"):
        check_space(job)


def test_the_papers_values_outside_the_space_are_rejected() -> None:
    said = refused({"train.lr": {"log_uniform": [1e-3, 1e-2]}})

    assert said.startswith("tune.paper_first: train.lr 0.0001 is not in log_uniform [0.001, 0.01]; widen the space")


def test_a_front_needs_two_errors() -> None:
    job = TuneJob(model={"tasks": ["age"]}, train={"data": "d"}, tune={"space": {"train.lr": LR}, "mode": "pareto"})
    with pytest.raises(ConfigError, match="pareto needs two tasks"):
        check_space(job)


# Draws


def test_the_papers_point_comes_first_and_is_marked() -> None:
    space = {"loss.race_weight": {"uniform": [0, 2]}, "train.lr": LR}
    job = tune_job(space, points_to_evaluate=[{"train.lr": 2e-3}])

    assert points(job.tune) == [{"loss.race_weight": 0.5, "train.lr": 1e-4}, {"train.lr": 2e-3}]
    assert is_papers(job, points(job.tune)[0])
    assert not is_papers(job, {"loss.race_weight": 0.5, "train.lr": 2e-3})


def test_keys_that_are_not_searched_must_have_the_papers_values_too() -> None:
    job = TuneJob(train={"data": "d"}, loss={"age_weight": 0.1}, tune={"space": {"train.lr": LR}})
    point = points(job.tune)[0]

    assert not is_papers(job, point)
    assert unlike_papers(job) == ["loss.age_weight"]
    assert is_papers(tune_job({"train.lr": LR}), point)
    assert unlike_papers(tune_job({"train.lr": LR})) == []
    # Where a key's condition does not hold, the recipe's value is trained with.
    conditional = {"train.optimizer": OPTIMIZER, "train.lr": LR | {"when": {"train.optimizer": "sgd"}}}
    assert is_papers(tune_job(conditional), {"train.optimizer": "adam"})
    assert not is_papers(tune_job(conditional, {"lr": 1e-3}), {"train.optimizer": "adam"})


def test_a_conditional_key_is_drawn_only_if_its_condition_holds() -> None:
    config = tune_job(
        {
            "train.weight_decay": {"log_uniform": [1e-4, 1e-1], "when": {"train.optimizer": ["adamw"]}},
            "train.optimizer": {"choice": ["adam", "adamw"]},
        }
    ).tune
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

    drawn = [suggest(study.ask(), config.space) for _ in range(20)]

    assert {params["train.optimizer"] for params in drawn} == {"adam", "adamw"}
    assert all(("train.weight_decay" in params) == (params["train.optimizer"] == "adamw") for params in drawn)


def test_optuna_stores_lists_as_text() -> None:
    config = tune_job({"train.image_sizes": {"choice": [[64, 224], [224]]}}).tune
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

    drawn = [suggest(study.ask(), config.space) for _ in range(10)]
    values = [values_of(config.space, params)["train.image_sizes"] for params in drawn]

    assert {params["train.image_sizes"] for params in drawn} == {"[64, 224]", "[224]"}
    assert set(values) == {(64, 224), (224,)}


def test_choices_keep_their_types() -> None:
    space = tune_job({"model.dropout": {"choice": [0, 0.5, "0"]}, "train.tf32": {"choice": [True, False]}}).tune.space

    assert [values_of(space, {"model.dropout": value})["model.dropout"] for value in (0, "0")] == [0, "0"]
    assert [type(value) for value in space["train.tf32"].choice or ()] == [bool, bool]


def test_steps_end_below_the_upper_bound() -> None:
    distribution = distribution_of(ParameterConfig(integer=(32, 100), step=32))

    assert isinstance(distribution, optuna.distributions.IntDistribution)
    assert (distribution.low, distribution.high, distribution.step) == (32, 96, 32)


# The trial's job


def test_a_trials_job_differs_only_in_the_searched_keys() -> None:
    job = base_job(tune_job({"train.lr": LR}, {"epochs": 7, "data_shares": []}))

    changed = with_values(job, {"train.lr": 3e-3, "loss.age_weight": 0.25, "train.name": "0003"})

    assert (changed.train.lr, changed.loss.age_weight, changed.train.name) == (3e-3, 0.25, "0003")
    assert changed.train.epochs == 7
    assert with_values(changed, {"train.lr": job.train.lr, "loss.age_weight": 1.0, "train.name": ""}) == job


def test_a_tune_config_is_frozen_and_starts_with_the_papers_values() -> None:
    assert TuneConfig().paper_first
    assert TuneConfig().asha
