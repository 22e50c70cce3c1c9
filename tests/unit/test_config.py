"""Configuration: precedence of sources, and one clear line for each invalid setting."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from agr_ray.config import (
    SECTIONS,
    CompareJob,
    EvaluateJob,
    Job,
    ModelConfig,
    PrepareJob,
    RenderJob,
    ScoreJob,
    SplitConfig,
    TrainConfig,
    TrainJob,
    TuneJob,
    digest,
    load,
    parse,
)
from agr_ray.config.presets import PRESETS
from agr_ray.errors import ConfigError

JOBS: tuple[type[Job], ...] = (RenderJob, PrepareJob, TrainJob, TuneJob, EvaluateJob, ScoreJob)
RECIPES = sorted(Path(__file__).parents[2].glob("agr_ray/recipes/*.toml"))
DATA = ("--train.data", "somewhere")
NEEDED = {"tune.space": '{"train.lr": {"log_uniform": [1e-4, 1e-2]}}'}
"""What else than "somewhere" a required key takes."""


def train_job(*argv: str, environ: dict[str, str] | None = None) -> TrainJob:
    return parse(TrainJob, [*DATA, *argv], environ or {})


def needed(job: type[Job]) -> list[str]:
    return [word for key in job.required for word in (f"--{key}", NEEDED.get(key, "somewhere"))]


def complaint(capsys: pytest.CaptureFixture[str], job: type[Job], *argv: str, **environ: str) -> str:
    """Return the one line on stderr with which `load` exits."""
    with pytest.raises(SystemExit) as exit_:
        load(job, argv, environ)
    said = capsys.readouterr()
    assert exit_.value.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.endswith("\n")
    assert said.err.count("\n") == 1
    return said.err


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text("[train]\nlr = 0.1\nepochs = 3\n\n[loss]\nage_weight = 2.0\n")
    return path


# Precedence


def test_defaults_are_the_papers() -> None:
    job = train_job()

    assert (job.model.backbone, job.model.image_size, job.model.age_head) == ("resnet50", 224, "linear")
    assert (job.loss.age_weight, job.loss.gender_weight, job.loss.race_weight) == (1.0, 0.5, 0.5)
    assert (job.train.optimizer, job.train.lr, job.train.batch_size, job.train.epochs) == ("adam", 1e-4, 32, 50)
    assert (job.train.schedule, job.train.step_size_epochs, job.train.gamma) == ("step", 20, 0.5)


def test_a_recipe_wins_over_defaults(recipe: Path) -> None:
    job = train_job("--config", str(recipe))

    assert (job.train.lr, job.train.epochs, job.loss.age_weight) == (0.1, 3, 2.0)
    assert job.train.batch_size == TrainConfig().batch_size


def test_the_environment_wins_over_the_recipe(recipe: Path) -> None:
    job = train_job("--config", str(recipe), environ={"AGR_RAY_TRAIN__LR": "0.2"})

    assert (job.train.lr, job.train.epochs) == (0.2, 3)


def test_the_command_line_wins_over_the_environment(recipe: Path) -> None:
    environ = {"AGR_RAY_TRAIN__LR": "0.2", "AGR_RAY_TRAIN__EPOCHS": "4"}

    job = train_job("--config", str(recipe), "--train.lr", "0.3", environ=environ)

    assert (job.train.lr, job.train.epochs, job.loss.age_weight) == (0.3, 4, 2.0)


def test_the_order_of_options_does_not_matter(recipe: Path) -> None:
    assert train_job("--train.lr", "0.3", "--config", str(recipe)).train.lr == 0.3


def test_a_default_value_on_the_command_line_wins_too(recipe: Path) -> None:
    assert train_job("--config", str(recipe), "--train.epochs", "50").train.epochs == 50


def test_foreign_variables_are_left_alone() -> None:
    assert train_job(environ={"TRAIN__LR": "9", "LR": "9", "AGR_TRAIN__LR": "9"}).train.lr == 1e-4


def test_lists_and_tables_come_from_the_command_line() -> None:
    assert train_job("--model.tasks", '["age", "race"]').model.tasks == ("age", "race")
    codes = parse(PrepareJob, [*needed(PrepareJob), "--source.gender_codes", '{"M": "male"}'], {}).source.gender_codes
    assert codes == {"M": "male"}


SEVERAL = ("data/one", "s3://two/a, b")


@pytest.mark.parametrize("uri", ["data/one", "s3://sets/a,b", "7", "null", "a b", '"quoted"', "./[brackets]"])
def test_a_single_set_is_the_same_from_command_line_environment_and_recipe(tmp_path: Path, uri: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"[train]\ndata = {json.dumps(uri)}\n")

    jobs = [
        parse(TrainJob, ["--train.data", uri], {}),
        parse(TrainJob, ["--train.data", json.dumps([uri])], {}),
        parse(TrainJob, [], {"AGR_RAY_TRAIN__DATA": uri}),
        parse(TrainJob, ["--config", str(recipe)], {}),
    ]

    assert {(job.train.data, job.train.data_uris) for job in jobs} == {(uri, (uri,))}


def test_several_sets_are_a_list_wherever_they_are_written(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[train]\ndata = ["data/one", "s3://two/a, b"]\ndata_shares = [3, 0.5]\n')
    uris, shares = json.dumps(SEVERAL), "[3, 0.5]"

    jobs = [
        parse(TrainJob, ["--train.data", uris, "--train.data_shares", shares], {}),
        parse(TrainJob, [], {"AGR_RAY_TRAIN__DATA": uris, "AGR_RAY_TRAIN__DATA_SHARES": shares}),
        parse(TrainJob, ["--config", str(recipe)], {}),
        TrainJob(train=TrainConfig.model_validate({"data": SEVERAL, "data_shares": (3, 0.5)})),
    ]

    assert {(job.train.data_uris, job.train.data_shares) for job in jobs} == {(SEVERAL, (3.0, 0.5))}
    assert TrainJob.model_validate_json(jobs[0].model_dump_json()) == jobs[0]
    assert parse(TrainJob, ["--config", str(recipe), "--train.data_shares", "[]"], {}).train.data_shares == ()


def test_shares_in_a_recipe_apply_to_sets_of_the_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[train]\ndata_shares = [1, 2]\n")

    assert parse(TrainJob, ["--config", str(recipe), "--train.data", '["a", "b"]'], {}).train.data_shares == (1, 2)
    parse(EvaluateJob, ["--config", str(recipe), *needed(EvaluateJob)], {})


def test_lists_come_from_the_environment() -> None:
    assert train_job(environ={"AGR_RAY_MODEL__TASKS": '["age"]'}).model.tasks == ("age",)


def test_a_number_can_be_reset_to_none(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[train]\nthreads_per_worker = 3\n")

    assert train_job("--config", str(recipe), "--train.threads_per_worker", "None").train.threads_per_worker is None


@pytest.mark.parametrize("spelling", ["--train.batch-size", "--train.batch_size"])
def test_hyphens_and_underscores_in_options_are_equivalent(spelling: str) -> None:
    assert train_job(spelling, "8").train.batch_size == 8
    assert train_job(f"{spelling}=8").train.batch_size == 8


def test_dashes_in_values_are_kept() -> None:
    assert train_job("--train.out", "s3://my-bucket/a-b").train.out == "s3://my-bucket/a-b"
    assert train_job("--train.out=--odd-name").train.out == "--odd-name"


@pytest.mark.parametrize(("argv", "expected"), [((), False), (("--new-run",), True), (("--new_run",), True)])
def test_new_run_is_a_flag(argv: tuple[str, ...], expected: bool) -> None:
    assert train_job(*argv).new_run is expected


@pytest.mark.parametrize(("argv", "expected"), [((), False), (("--dry-run",), True), (("--no-dry-run",), False)])
def test_dry_run_is_a_flag(argv: tuple[str, ...], expected: bool) -> None:
    assert train_job(*argv).dry_run is expected


def test_new_run_can_come_from_the_environment_and_be_overridden() -> None:
    environ = {"AGR_RAY_NEW_RUN": "true"}

    assert train_job(environ=environ).new_run is True
    assert train_job("--no-new-run", environ=environ).new_run is False


# Presets


def test_a_preset_fills_in_missing_keys() -> None:
    model = train_job("--model.preset", "lightweight").model

    assert (model.backbone, model.image_size, model.bn_momentum) == ("mobilenet_v3_small", 112, 0.1)


@pytest.mark.parametrize("how", ["recipe", "environment", "command line"])
def test_an_explicit_key_wins_over_the_preset(how: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[model]\nimage_size = 64\n" if how == "recipe" else "")
    environ = {"AGR_RAY_MODEL__IMAGE_SIZE": "64"} if how == "environment" else {}
    argv = ["--model.image_size", "64"] if how == "command line" else []

    model = train_job("--config", str(recipe), "--model.preset", "lightweight", *argv, environ=environ).model

    assert (model.image_size, model.backbone) == (64, "mobilenet_v3_small")


def test_the_command_line_can_replace_a_recipes_preset(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[model]\npreset = "lightweight"\ndropout = 0.2\n')

    model = train_job("--config", str(recipe), "--model.preset", "paper").model

    assert (model.backbone, model.image_size, model.dropout) == ("resnet50", 224, 0.2)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_network_survives_being_written_down_and_read(preset: str) -> None:
    model = ModelConfig(preset=preset, dropout=0.1)  # type: ignore[arg-type]

    assert ModelConfig(**model.model_dump(mode="json")) == model


# One line for invalid settings


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--train.lrr", "1"], "--train.lrr: there is no such option; did you mean --train.lr?"),
        (["--trian.lr", "1"], "--trian.lr: there is no such option; did you mean --train.lr?"),
        (["--train.batchsize=1"], "--train.batchsize: there is no such option; did you mean --train.batch_size?"),
        (["stray"], "stray"),
        (["--train.lr"], "--lr: expected one argument"),
        (["--train.l", "1"], "--train.l"),  # no abbreviations: a new knob must not change what one means
        (["--train.lr", "fast"], "train.lr: 'fast' is not allowed: input should be a valid number"),
        (["--train.lr", "0"], "train.lr: '0' is not allowed: input should be greater than 0"),
        (["--train.lr", "nan"], "train.lr: 'nan' is not allowed"),
        (["--train.lr", "inf"], "train.lr: 'inf' is not allowed"),
        (["--train.epochs", "2.5"], "train.epochs: '2.5' is not allowed"),
        (["--train.optimizer", "lion"], "'adam', 'adamw' or 'sgd'"),
        (["--augment.flip_probability", "1.5"], "augment.flip_probability: '1.5' is not allowed"),
        (["--model.preset", "huge"], "there is no preset 'huge'; allowed: paper, "),
        (["--model.tasks", '["height"]'], "model.tasks"),
        (["--model.tasks", '["age", "age"]'], "at most once"),
        (["--model.tasks", "[]"], "at least one of"),
        (["--model.tasks", "[broken"], "model.tasks"),
        (["--train.image_sizes", "[64, 96]"], "train.image_sizes [64, 96] must end with model.image_size 224"),
        (
            ["--train.schedule", "plateau", "--train.plateau_epochs", "10"],
            "train: plateau_epochs 10 must be less than early_stopping_patience 10",
        ),
        (["--loss.age_loss", "l2"], "loss.age_loss: 'l2' is not allowed: input should be 'l1', 'mse' or 'huber'"),
        (["--loss.age_scale_years", "0"], "loss.age_scale_years: '0' is not allowed: input should be greater than 0"),
        (
            ["--loss.weighting", "uncertainty", "--loss.gender_weight", "0"],
            "loss: gender_weight 0.0 must be greater than 0 when weighting is uncertainty",
        ),
        (["--train.balance", "ages"], "'none', 'age', 'gender', 'race' or 'cells'"),
        (["--train.balance_power", "2"], "train.balance_power: '2' is not allowed: input should be less than or equal"),
        (["--augment.mixup_alpha", "-1"], "augment.mixup_alpha: '-1' is not allowed"),
        (["--augment.randaugment_magnitude", "31"], "augment.randaugment_magnitude: '31' is not allowed"),
        (["--train.layer_decay", "0"], "train.layer_decay: '0' is not allowed: input should be greater than 0"),
        (["--train.freeze_epochs", "-1"], "train.freeze_epochs: '-1' is not allowed"),
        (["--train.batch_size", "3", "--train.num_workers", "2"], "train.batch_size 3 is too small for"),
        (["--train.batch_size", "15", "--train.num_workers", "[2, 8]"], "train.num_workers 8: each needs two images"),
        (["--train.num_workers", "[3, 2]"], "num_workers [3, 2]: the minimum comes first"),
        (["--train.batch_size", "1"], "train.batch_size 1 is too small"),
        (
            ["--train.batch_size", "12", "--train.num_workers", "2", "--train.grad_accum_steps", "4"],
            "train.batch_size 12 is too small for train.num_workers 2 and train.grad_accum_steps 4: "
            "each needs two images",
        ),
        (
            ["--train.grad_accum_steps", "0"],
            "train.grad_accum_steps: '0' is not allowed: input should be greater than 0",
        ),
        (
            ["--train.precision", "float16"],
            "train: precision float16 requires use_gpu; on a CPU: auto, float32, bfloat16",
        ),
        (["--predict.precision", "float16"], "'auto', 'float32', 'bfloat16' or 'int8'"),
        (["--train.sync_batch_norm", "true"], "train: sync_batch_norm true requires use_gpu"),
        (["--train.data", '["a"'], "train.data: '[\"a\"' is not JSON"),
        (["--train.data", '["a", ""]'], "train.data: ['a', ''] must be a list of non-empty strings"),
        (["--train.data", '["a", 3]'], "train.data: ['a', 3] must be a list of non-empty strings"),
        (["--train.data", "[]"], "train.data is needed"),
        (
            ["--train.data_shares", "[1]"],
            "train.data_shares [1.0] needs several sets in train.data, which is 'somewhere'",
        ),
        (
            ["--train.data", '["a", "b"]', "--train.data_shares", "[1, 2, 3]"],
            "train.data_shares [1.0, 2.0, 3.0] must have a number for each of the 2 sets in train.data",
        ),
        (["--train.data", '["a", "b"]', "--train.data_shares", "[1, 0]"], "train.data_shares.1: 0 is not allowed"),
    ],
    ids=str,
)
def test_a_bad_command_line_gives_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    data = () if "--train.data" in argv else DATA  # given twice, it is a list of two
    assert said in complaint(capsys, TrainJob, *data, *argv)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"AGR_RAY_TRAIN__LRR": "1"}, "train.lrr: there is no such key; did you mean lr?; allowed: data, data_shares"),
        ({"AGR_RAY_TRIAN__LR": "1"}, "TRIAN"),
        ({"AGR_RAY_TRAIN": "5"}, "AGR_RAY_TRAIN: its value is not a JSON object"),
        ({"AGR_RAY_SCORE": "5"}, "AGR_RAY_SCORE: its value is not a JSON object"),
        ({"AGR_RAY_SCORE": '{"limti": 5}'}, "score.limti: there is no such key; did you mean limit?"),
        ({"AGR_RAY_SCORE__LIMTI": "5"}, "score.limti: there is no such key; did you mean limit?"),
        ({"AGR_RAY_SCORE__LIMIT": "-5"}, "score.limit: '-5' is not allowed"),
        ({"AGR_RAY_SCORE__LIMIT__X": "5"}, "score.limit: a table is not allowed"),
        ({"AGR_RAY_ADD": "some"}, "add: 'some' is not allowed"),
        ({"AGR_RAY_ADD__X": "5"}, "AGR_RAY_ADD__X: add has no keys; set AGR_RAY_ADD"),
        ({"AGR_RAY_CONFIG": "x.toml"}, "AGR_RAY_CONFIG: there is no section config"),
        ({"AGR_RAY_TRAIN__LR": "fast"}, "train.lr: 'fast' is not allowed"),
        ({"AGR_RAY_MODEL__TASKS": "[broken"}, "AGR_RAY_MODEL__TASKS: '[broken' is not JSON; lists"),
    ],
    ids=str,
)
def test_a_bad_environment_gives_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], environ: dict[str, str], said: str
) -> None:
    assert said.lower() in complaint(capsys, TrainJob, *DATA, **environ).lower()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[trian]\nlr = 1\n", "there is no section [trian]; did you mean train?; allowed: storage, cluster"),
        ("[train]\nbatchsize = 1\n", "train.batchsize: there is no such key; did you mean batch_size?"),
        ("[train]\nlr = -1\n", "train.lr: -1 is not allowed: input should be greater than 0"),
        ("train = 3\n", "train must be a table: [train]"),
        ("[train.lr]\nx = 1\n", "train.lr"),
        ("[[train]]\nlr = 1\n", "train must be a table"),
        ("[model]\npreset = ['paper']\n", "model.preset: ['paper'] is not allowed"),
        ("[score]\nouts = 'a'\n", "score.outs: there is no such key; did you mean out?"),
        ("[score]\nbatch_size = 0\n", "score.batch_size: 0 is not allowed"),
        ("[split]\nval = 0.6\ntest = 0.5\n", "split: val 0.6 + test 0.5 is greater than 1"),
        ("lr = \n", "not valid TOML"),
        ("[train]\nlr = 1\nlr = 2\n", "not valid TOML"),
    ],
    ids=str,
)
def test_a_bad_recipe_gives_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said: str
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)

    assert said in complaint(capsys, TrainJob, *DATA, "--config", str(recipe))


def test_a_binary_recipe_gives_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(b"\xff\xfe\x00")

    assert "not valid TOML" in complaint(capsys, TrainJob, *DATA, "--config", str(recipe))


def test_a_missing_recipe_is_named_in_the_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.toml"

    assert f"--config {missing}: No such file" in complaint(capsys, TrainJob, *DATA, "--config", str(missing))


@pytest.mark.parametrize(
    ("name", "hint"), [("papr", "; did you mean paper?"), ("tune-lite", "; did you mean tune_lite?"), ("xyz", "")]
)
def test_an_unknown_recipe_is_rejected_with_the_list_of_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("[train]\nepochs = 1\n")

    said = complaint(capsys, TrainJob, *DATA, "--config", name)

    names = ", ".join(path.stem for path in RECIPES)
    assert f"--config {name}: there is no such recipe{hint}; allowed: {names}, or a path" in said


def test_a_recipe_of_the_package_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper").write_text("[train]\nepochs = 1\n")

    assert train_job("--config", "paper").model == ModelConfig(preset="paper", pretrained="imagenet")
    assert train_job("--config", "./paper").train.epochs == 1


def test_a_folder_is_not_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert f"--config {tmp_path}" in complaint(capsys, TrainJob, *DATA, "--config", str(tmp_path))


@pytest.mark.parametrize("job", JOBS)
def test_each_missing_required_key_is_named_in_the_error(capsys: pytest.CaptureFixture[str], job: type[Job]) -> None:
    for key in job.required:
        others = [
            word for other in job.required if other != key for word in (f"--{other}", NEEDED.get(other, "somewhere"))
        ]
        said = complaint(capsys, job, *others)
        assert f"{key} is needed" in said
        assert f"Give {job.option(key)} or" in said
    parse(job, needed(job), {})


def test_parse_raises_the_error_that_load_prints() -> None:
    with pytest.raises(ConfigError, match=r"train\.lr: '0' is not allowed"):
        train_job("--train.lr", "0")


# Documentation


@pytest.mark.parametrize("name", SECTIONS)
def test_every_knob_is_documented(name: str) -> None:
    section = SECTIONS[name]

    assert section.__doc__
    undocumented = [key for key, field in section.model_fields.items() if not field.description]
    assert undocumented == []


@pytest.mark.parametrize("job", JOBS)
def test_every_section_of_a_job_can_be_in_a_recipe(job: type[Job]) -> None:
    for name, field in job.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert SECTIONS[name] is field.annotation
        else:
            assert field.description


@pytest.mark.parametrize("job", JOBS)
def test_help_lists_every_knob_with_its_documentation(capsys: pytest.CaptureFixture[str], job: type[Job]) -> None:
    with pytest.raises(SystemExit) as exit_:
        load(job, ["--help-all"], {})

    # Without blanks, because help is wrapped to the terminal's width, words with hyphens too.
    shown = "".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    assert "--config" in shown
    for name in SECTIONS.keys() & job.model_fields.keys():
        for key, field in SECTIONS[name].model_fields.items():
            assert job.option(f"{name}.{key}") in shown
            assert "".join((field.description or "").split()) in shown


@pytest.mark.parametrize("flag", ["--help", "--help-all", "-h"])
def test_help_shows_the_values_of_the_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: str) -> None:
    recipe = tmp_path / "own.toml"
    address = "https://user:hunter2@mlflow.example"
    recipe.write_text(f'[train]\nlr = 0.25\nname = "50 %"\nmlflow_uri = "{address}"\n[evaluate]\nsplit = "val"\n')

    for argv in ([flag, "--config", str(recipe)], [f"--config={recipe}", "--epochs", "3", flag]):
        with pytest.raises(SystemExit) as ended:
            load(TrainJob, argv, {})
        shown = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0
        assert "(recipe: 0.25)" in shown
        assert "(recipe: 50 %)" in shown
        assert "(default: 1e-4)" not in shown
        assert "hunter2" not in shown


def test_help_asks_no_server_for_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(TrainJob, ["--help", "--config", "s3://bucket/recipe.toml"], {})

    assert ended.value.code == 0
    assert "--epochs" in capsys.readouterr().out


def test_help_of_a_broken_recipe_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(TrainJob, ["--help", "--config", "nope"], {})

    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: --config nope: there is no such recipe")


def test_help_shows_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(TrainJob, ["--help-all"], {})

    shown = " ".join(capsys.readouterr().out.split())
    assert "Peak learning rate of the schedule. (default: 0.0001)" in shown
    assert "Side of the network's input, pixels. (default: 224)" in shown


# Recipes


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"demo", "paper", "tune_lite", "utkface_lite"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("job", JOBS)
def test_every_recipe_is_valid_for_every_job(job: type[Job], path: Path) -> None:
    built = parse(job, ["--config", path.stem, *needed(job)], {})

    for name, values in tomllib.loads(path.read_text()).items():
        if name in job.model_fields:
            section = getattr(built, name).model_dump(mode="json", exclude_unset=True)
            assert {key: section[key] for key in values} == values


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_a_description_and_its_command(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]

    assert len(head[0]) > 10
    assert any("agr-ray " in line or "make " in line for line in head)


# Digests


def test_the_digest_is_the_same_in_every_process() -> None:
    code = "from agr_ray.config import TrainConfig, digest; print(digest(TrainConfig(lr=0.5)))"

    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    assert digest(TrainConfig(lr=0.5)) == other


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    one, other = ({"M": "male", "F": "female"}, {"F": "female", "M": "male"})

    jobs = [
        parse(PrepareJob, needed(PrepareJob), {}).source.model_copy(update={"gender_codes": c}) for c in (one, other)
    ]

    assert digest(jobs[0]) == digest(jobs[1])


def test_the_digest_depends_on_every_value_and_the_order_of_sections() -> None:
    changed = [
        TrainConfig(),
        TrainConfig(lr=2e-4),
        TrainConfig(seed=1),
        TrainConfig(name="x"),
        TrainConfig(use_gpu=True),
    ]

    digests = {digest(config) for config in changed}
    digests |= {digest(TrainConfig(), SplitConfig()), digest(SplitConfig(), TrainConfig())}

    assert len(digests) == len(changed) + 2
    assert {len(each) for each in digests} == {12}


# Sections


def test_a_configuration_is_never_edited() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        train_job().train.lr = 1.0  # type: ignore[misc]


def test_a_section_built_in_code_rejects_unknown_keys() -> None:
    with pytest.raises(ValidationError, match="lrr"):
        TrainConfig(lrr=1)  # type: ignore[call-arg]


def test_training_gets_the_rest_of_validation_and_test() -> None:
    assert SplitConfig(val=0.25, test=0.5).fractions == {"train": 0.25, "val": 0.25, "test": 0.5}
    assert SplitConfig(val=0.0, test=1.0).fractions["train"] == 0.0


@pytest.mark.parametrize(
    ("word", "meant"),
    [("person", "subject"), ("Id", "subject"), ("file", "key"), ("path", "key"), ("sex", "gender"), ("rase", "race")],
)
def test_another_word_for_a_column_names_the_column(word: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(PrepareJob, [*needed(PrepareJob), "--source.columns", f"age=alter,{word}=x"], {})

    assert str(caught.value) == (
        f"source.columns: there is no column {word!r}; did you mean {meant}?; "
        "allowed: key, age, age_low, age_high, gender, race, subject, split, fold"
    )


def test_a_job_knows_the_recipe_of_its_command_line(recipe: Path) -> None:
    assert train_job("--config", str(recipe)).recipe == str(recipe)
    assert train_job().recipe == ""


def test_the_help_of_prepare_shows_how_to_read_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(PrepareJob, ["--help"], {})

    shown = capsys.readouterr().out
    assert all(f"--source.{name} " in shown for name in ("columns", "gender_codes", "race_codes", "missing_values"))


@pytest.mark.parametrize("option", ["--data", "--train.data"])
def test_a_second_word_after_a_path_option_says_to_repeat_it(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(TrainJob, [option, "data/one", "data/two", "--epochs", "3"], {})

    shown = capsys.readouterr().err
    assert shown.startswith(f"error: data/two: is no option; repeat {option} for several: {option} A {option} B (")


def test_a_stray_word_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(TrainJob, ["--data", "data/one", "--epochs", "3", "4"], {})

    assert capsys.readouterr().err.startswith("error: 4: is no option (")


def test_an_option_without_its_section_names_the_full_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(PrepareJob, ["--uri", "faces"], {})

    assert "--uri: there is no such option; did you mean --source.uri?" in capsys.readouterr().err


def test_the_help_shows_a_list_without_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(CompareJob, ["--help"], {})

    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: paper, single_task_age," in shown
    assert "('" not in shown
