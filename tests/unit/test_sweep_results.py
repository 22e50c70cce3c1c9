"""A sweep's results from trials that never ran: table, recipe, checkpoint, report."""

from __future__ import annotations

import html
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from agr_ray.config import ClusterConfig, LabelsConfig, LossConfig, ModelConfig, TrainJob, TuneJob, parse
from agr_ray.errors import ConfigError
from agr_ray.labels import UTKFACE
from agr_ray.learn.run import Run
from agr_ray.models.checkpoint import CALIBRATION, model_digest
from agr_ray.models.checkpoint_files import local_checkpoint
from agr_ray.models.checkpoint_network import save_checkpoint
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.transform import Transform
from agr_ray.report.page_html import page_html
from agr_ray.report.page_markdown import page_markdown
from agr_ray.report.sweep_report import sweep_report
from agr_ray.report.sweep_results import best_recipe, print_trials, write_results
from agr_ray.schema import HISTORY
from agr_ray.storage import Storage
from agr_ray.tuning.plan import plan_sweep
from agr_ray.tuning.sweep import Sweep

STORAGE = Storage()
SPACE = {
    "loss.age_weight": {"log_uniform": [0.05, 2.0]},
    "loss.race_weight": {"log_uniform": [0.1, 4.0]},
    "train.lr": {"log_uniform": [1e-4, 1e-2]},
}
GUESSED = {
    "age": {"mae_years": 15.0},
    "gender": {"balanced_accuracy": 0.5},
    "race": {"balanced_accuracy": 0.2},
}
RUN = cast(
    Run,
    SimpleNamespace(
        data={"uri": "/faces", "split_manifest_sha256": "ab" * 32},
        num_train_rows=2100,
        num_val_rows=600,
        git_commit="c0ffee",
    ),
)


def tune_job(folder: Path, **changes: Any) -> TuneJob:
    settings = {"space": SPACE, "out": str(folder / "sweeps"), "name": "lite", "trials": 6, "random_trials": 6}
    return TuneJob(
        loss=LossConfig(gender_weight=0.7),
        train={"data": str(folder / "data"), "out": str(folder / "runs"), "epochs": 4},
        tune=settings | changes,
    )


def swept(job: TuneJob, console: Console) -> Sweep:
    """Return a sweep with four complete trials, of which trial 2 is the best, a pruned one and a failed one."""
    sweep = Sweep(STORAGE, plan_sweep(STORAGE, job, "of the data"), job, console)
    sweep.begin()
    for number, objectives in enumerate([[0.9, 0.8], [0.9, 0.7], [0.8, 0.55], [0.9, 0.85], [0.95], []]):
        assert sweep.next() is not None
        sweep.started(number)
        rows = [
            dict.fromkeys(HISTORY.names, 0.7)
            | {"epoch": epoch, "step": epoch, "num_train_rows": 1, "num_val_rows": 1, "val_age_mae_years": 10 * value}
            | {"val_objective": value, "val_balanced_objective": value}
            for epoch, value in enumerate(objectives, 1)
        ]
        for row in rows:
            sweep.reported(number, row)
        folder = Path(sweep.trial_uri(number))
        (folder / "best").mkdir(parents=True)
        STORAGE.write_table(pa.Table.from_pylist(rows, schema=HISTORY), str(folder / "history.parquet"))
        (folder / "run.json").write_text(json.dumps({"finished": "epochs"}))
        meta = {"metrics": {"epoch": len(objectives), "val": {"baseline": GUESSED}}}
        (folder / "best" / "meta.json").write_text(json.dumps(meta))
        if number == 5:
            sweep.failed(number, "killed: its process died")
        else:
            sweep.ended(number, "after epoch 1 not among the best 1 of 3" if number == 4 else "")
    sweep.clean()
    return sweep


@pytest.fixture
def console(tmp_path: Path) -> Console:
    return Console(record=True, width=200, file=(tmp_path / "printed").open("w"))


def test_everything_is_written_from_the_trials(tmp_path: Path, console: Console) -> None:
    sweep = swept(tune_job(tmp_path), console)
    folder = Path(sweep.plan.uri)

    write_results(sweep, RUN, console)

    assert pq.read_table(folder / "trials.parquet")["state"].to_pylist() == ["complete"] * 4 + ["pruned", "failed"]
    assert json.loads((folder / "best" / "meta.json").read_text())["metrics"]["epoch"] == 2
    page = (folder / "report.html").read_text()
    for said in ("Sweep lite", "killed: its process died", "train.lr", "c0ffee", "15.0"):
        assert said in page
    job = parse(TrainJob, ["--config", str(folder / "best.toml")], {})
    assert job.train.lr == sweep.trials[2].params["train.lr"]
    assert (job.train.name, job.train.out) == ("lite-best", str(tmp_path / "runs"))
    assert "[vision]" not in (folder / "best.toml").read_text()


@pytest.mark.usefixtures("blank_pngs")
def test_the_page_is_rebuilt_from_the_folder(tmp_path: Path, console: Console) -> None:
    sweep = swept(tune_job(tmp_path, mode="pareto", constraints={"age_mae_years": 7}), console)
    write_results(sweep, RUN, console)
    first = (Path(sweep.plan.uri) / "report.html").read_text()

    assert page_html(sweep_report(STORAGE, sweep.plan.uri + "/")) == first
    assert (Path(sweep.plan.uri) / "report-figures" / "history.png").exists()


def test_a_page_of_a_sweep_that_is_still_running_can_be_written(tmp_path: Path, console: Console) -> None:
    sweep = swept(tune_job(tmp_path), console)

    page = page_markdown(sweep_report(STORAGE, sweep.plan.uri), "figures")

    assert "**Trial 2 was chosen" in page
    assert "no best.toml" in page


@pytest.mark.usefixtures("blank_figures")
def test_epochs_of_a_trial_that_has_not_ended_are_on_the_page(tmp_path: Path, console: Console) -> None:
    job = tune_job(tmp_path)
    sweep = Sweep(STORAGE, plan_sweep(STORAGE, job, "of the data"), job, console)
    sweep.begin()
    assert sweep.next() is not None
    sweep.reported(0, dict.fromkeys(HISTORY.names, 0.7) | {"epoch": 1, "val_balanced_objective": 0.8})

    write_results(sweep, RUN, console)

    page = (Path(sweep.plan.uri) / "report.md").read_text()
    assert "- epochs of all trials: 1" in page
    assert pq.read_table(Path(sweep.plan.uri) / "trials.parquet")["epochs"].to_pylist() == [1]


def test_a_folder_without_a_sweep_is_named(tmp_path: Path, console: Console) -> None:
    with pytest.raises(ConfigError, match=r"no sweep; there is no sweep\.json"):
        sweep_report(STORAGE, str(tmp_path))

    sweep = swept(tune_job(tmp_path), console)
    record = json.loads(Path(sweep.plan.uri, "sweep.json").read_text())
    for content in ("{", "{}", json.dumps(record | {"config": {"tune": {"space": {"a": 1}}}})):
        Path(sweep.plan.uri, "sweep.json").write_text(content)
        with pytest.raises(ConfigError, match="not written by this version of agr-ray tune, or damaged") as error:
            sweep_report(STORAGE, sweep.plan.uri)
        assert "\n" not in str(error.value)


@pytest.mark.usefixtures("blank_figures")
def test_the_recipe_gives_the_same_training_again(tmp_path: Path, console: Console) -> None:
    job = tune_job(tmp_path)
    # What the preset sets and the command line takes back has no word in TOML.
    model = ModelConfig(preset="lightweight", bn_momentum=None)
    cluster, labels = ClusterConfig(num_cpus=12), LabelsConfig(space="fairface", age_groups=("0-17", "18+"))
    sweep = swept(job.model_copy(update={"model": model, "cluster": cluster, "labels": labels}), console)

    write_results(sweep, RUN, console)

    again = parse(TrainJob, ["--config", f"{sweep.plan.uri}/best.toml"], {})
    assert again.model == model.model_copy(update={"preset": "paper"})
    assert again.cluster == cluster
    assert again.labels == labels
    assert "[cluster]" not in best_recipe(swept(tune_job(tmp_path / "other"), console), sweep.trials[2])


@pytest.mark.usefixtures("blank_figures")
def test_trials_that_have_not_ended_are_not_shown_as_failed(tmp_path: Path, console: Console) -> None:
    job = tune_job(tmp_path)
    sweep = Sweep(STORAGE, plan_sweep(STORAGE, job, "of the data"), job, console)
    sweep.begin()
    assert sweep.next() is not None

    write_results(sweep, RUN, console)

    page = (Path(sweep.plan.uri) / "report.html").read_text()
    assert "failed, 1 not finished." in page


@pytest.mark.usefixtures("blank_figures")
def test_no_trial_is_the_papers_if_the_recipe_differs(tmp_path: Path, console: Console) -> None:
    job = tune_job(tmp_path)
    write_results(swept(job, console), RUN, console)
    assert "not among the trials" in (tmp_path / "sweeps" / "lite" / "report.html").read_text()  # gender's is 0.7

    job = tune_job(tmp_path / "papers").model_copy(update={"loss": LossConfig()})
    write_results(swept(job, console), RUN, console)
    assert "of the paper's own weights" in html.unescape((tmp_path / "papers/sweeps/lite/report.html").read_text())


@pytest.mark.usefixtures("blank_figures")
def test_the_report_has_the_front_of_the_table(tmp_path: Path, console: Console) -> None:
    sweep = swept(tune_job(tmp_path, mode="pareto"), console)

    write_results(sweep, RUN, console)

    table = pq.read_table(Path(sweep.plan.uri) / "trials.parquet")
    assert table["is_on_front"].to_pylist() == [False, False, True, False, False, False]
    assert "1 complete trial satisfies all constraints" in (Path(sweep.plan.uri) / "report.md").read_text()


def test_the_terminal_shows_the_best_first_and_why_trials_failed(tmp_path: Path, console: Console) -> None:
    print_trials(swept(tune_job(tmp_path), console), console)

    printed = console.export_text()
    assert (
        "trial 2 is complete after 2 epochs, objective 0.5500; 3 of 6 ended; best so far: trial 2, 0.5500 (new)"
        in printed
    )
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    assert lines[0].split("│")[1].strip() == "*"
    assert [line.split("│")[2].strip() for line in lines] == ["2", "1", "0", "3", "4", "5"]
    assert "trial 5 failed: killed: its process died" in printed


@pytest.mark.usefixtures("blank_figures")
def test_if_no_trial_satisfies_the_constraints_the_report_says_so(tmp_path: Path, console: Console) -> None:
    sweep = swept(tune_job(tmp_path, constraints={"age_mae_years": 3}), console)

    write_results(sweep, RUN, console)

    assert "no trial satisfies tune.constraints; the best one violates age_mae_years" in console.export_text()
    assert "age_mae_years at most 3 years" in (Path(sweep.plan.uri) / "report.md").read_text()


@pytest.mark.usefixtures("blank_pngs")
def test_a_sweep_without_a_complete_trial_has_a_table_and_a_page(tmp_path: Path, console: Console) -> None:
    job = tune_job(tmp_path)
    sweep = Sweep(STORAGE, plan_sweep(STORAGE, job, "of the data"), job, console)
    sweep.begin()
    assert sweep.next() is not None
    sweep.failed(0, "raised: x")

    write_results(sweep, RUN, console)

    folder = Path(sweep.plan.uri)
    assert pq.read_table(folder / "trials.parquet")["why"].to_pylist() == ["raised: x"]
    assert not (folder / "best.toml").exists()
    assert "No trial was completed" in (folder / "report.html").read_text()


# The checkpoint


def published_best(folder: Path, console: Console) -> tuple[Sweep, Path]:
    """Return a sweep whose trials left real checkpoints, and its best/, published and calibrated."""
    sweep = swept(tune_job(folder), console)
    for number in (2, 3):
        save(Path(sweep.trial_uri(number), "best"), seed=number)
    write_results(sweep, RUN, console)
    best = Path(sweep.plan.uri, "best")
    (best / CALIBRATION).write_text("{}")
    return sweep, best


def save(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    shutil.rmtree(folder, ignore_errors=True)
    model = MultiTaskNet(ModelConfig(backbone="mobilenet_v3_small", image_size=32), UTKFACE)
    save_checkpoint(folder, model, Transform(32, 32), metrics={"epoch": 2, "val": {"baseline": GUESSED}})


@pytest.mark.usefixtures("blank_figures")
def test_the_same_best_trial_keeps_its_calibration(tmp_path: Path, console: Console) -> None:
    sweep, best = published_best(tmp_path, console)
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(best.iterdir())]

    write_results(sweep, RUN, console)

    assert [(path.name, path.stat().st_mtime_ns) for path in sorted(best.iterdir())] == before
    assert CALIBRATION in [path.name for path in best.iterdir()]
    assert "calibrate it" not in console.export_text()


@pytest.mark.usefixtures("blank_figures")
def test_a_new_best_model_must_be_calibrated_again(tmp_path: Path, console: Console) -> None:
    sweep, best = published_best(tmp_path, console)
    save(Path(sweep.trial_uri(2), "best"), seed=7)

    write_results(sweep, RUN, console)

    assert not (best / CALIBRATION).exists()
    said = console.export_text()
    assert said.count(f"warning: {best} now holds another model, without the previous model's calibration") == 1
    assert f"{best} --data DATA --split val --calibrate" in said


def test_a_reader_never_gets_a_checkpoint_that_was_replaced_meanwhile(tmp_path: Path) -> None:
    """A publisher replaces a checkpoint again and again; each copy that is read is one of its models."""
    one, two, uri = tmp_path / "one", tmp_path / "two", str(tmp_path / "best")
    save(one, seed=1)
    save(two, seed=2)
    models = [model_digest(one), model_digest(two)]
    STORAGE.upload_tree(str(one), uri)
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for source in (two, one):
                STORAGE.upload_tree(str(source), uri, overwrite=True)
                stop.wait(0.3)

    publisher = threading.Thread(target=replace, daemon=True)
    publisher.start()
    try:
        for _ in range(5):
            with local_checkpoint(STORAGE, uri, "score.checkpoint") as loaded:
                assert loaded.digest in models
    finally:
        stop.set()
        publisher.join()
