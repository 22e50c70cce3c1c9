"""Progress of training: running metrics, a line, bars."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from heads import LINEAR, linear
from rich.console import Console

from agr_ray.config import AugmentConfig, ModelConfig, TrainConfig, TrainJob
from agr_ray.evaluation.metrics import Baseline, MetricSums
from agr_ray.labels import UTKFACE, Labels
from agr_ray.learn import loop, step
from agr_ray.learn.context import LocalContext
from agr_ray.learn.loop import train
from agr_ray.learn.losses import Heads
from agr_ray.learn.progress import Progress, duration
from agr_ray.learn.running import running_sums
from agr_ray.models.heads.base import Targets
from agr_ray.models.network import MultiTaskNet, Outputs
from agr_ray.models.transform import Transform
from agr_ray.predict.forward import average
from agr_ray.runtime.training.board import TrainingBars, progress_board

SIDE = 32
NUM = 21
RUNNING = {"age_mae_years": 5.012, "gender_accuracy": 0.928, "race_accuracy": 0.8199}
PROGRESS = Progress(3, 24, 1024, 13000, 2.803, RUNNING, 130.0, 0.004, 21 * 13000, 137.7)


def faces() -> dict[str, Any]:
    """Return noise with labels, of which every third is missing."""
    rng = np.random.default_rng(0)
    age, gender, race = rng.integers(0, 100, NUM).astype(np.float32), rng.integers(0, 2, NUM), rng.integers(0, 5, NUM)
    age[::3], gender[1::3], race[2::3] = math.nan, -1, -1
    return {"crop": rng.integers(0, 256, (NUM, 38, 38, 3), np.uint8), "age": age, "gender": gender, "race": race}


def shown_in_an_epoch(monkeypatch: pytest.MonkeyPatch, augment: AugmentConfig, **model: Any) -> list[Progress]:
    """Train an epoch with a rate that changes no weight, and return the progress after each step."""
    monkeypatch.setattr(loop, "_PROGRESS_S", 0.0)
    data = faces()
    job = TrainJob(
        model=ModelConfig(preset="lightweight", image_size=SIDE, dropout=0.0, **model),
        augment=augment,
        train=TrainConfig(epochs=1, batch_size=8, lr=1e-30, optimizer="sgd", schedule="constant"),
    )
    torch.manual_seed(0)
    network = MultiTaskNet(job.model, UTKFACE)
    network.initialise({"age": np.array([30.0, 70.0])})
    shown: list[Progress] = []
    context = LocalContext(data, data, 8, on_progress=shown.append)
    labels = Labels.from_arrays(UTKFACE, data)
    train(context, network, Transform(SIDE, SIDE), job, Baseline.fit(labels), NUM)
    return shown


def random_outputs(num: int) -> Outputs:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(num, generator=generator) for _ in range(2)]
    return linear(50 + 60 * draw[0], draw[1], torch.randn(num, 5, generator=generator))


def test_running_sums_equal_those_of_the_metrics() -> None:
    data, outputs = faces(), random_outputs(NUM)
    expected = MetricSums(UTKFACE)
    expected.update(Labels.from_arrays(UTKFACE, data), average(LINEAR, [outputs]))
    report = expected.to_json()

    sums = running_sums(LINEAR, outputs, {task: torch.tensor(data[task]) for task in LINEAR})

    means = (sums[:3] / sums[3:]).tolist()
    assert sums[3:].tolist() == [14, 14, 14]
    assert means[0] == pytest.approx(report["age"]["mae_years"], rel=1e-6)
    assert means[1:] == pytest.approx([report["gender"]["accuracy"], report["race"]["accuracy"]])


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.4])
def test_progress_shows_the_mean_over_the_epoch_so_far(monkeypatch: pytest.MonkeyPatch, mixup_alpha: float) -> None:
    seen: list[tuple[Outputs, Targets]] = []

    def noted(parts: Heads, outputs: Outputs, targets: Targets) -> torch.Tensor:
        seen.append((outputs, targets))
        return running_sums(parts, outputs, targets)

    monkeypatch.setattr(step, "running_sums", noted)

    shown = shown_in_an_epoch(monkeypatch, AugmentConfig(mixup_alpha=mixup_alpha))

    assert [progress.num_samples for progress in shown] == [8, 16, 21]
    data = faces()
    ages = np.concatenate([targets["age"].numpy() for _, targets in seen])
    assert np.array_equal(np.sort(ages), np.sort(data["age"]), equal_nan=True)  # each image's own, mixed or not
    for num_steps, progress in enumerate(shown, start=1):
        outputs, targets = zip(*seen[:num_steps], strict=True)
        age = torch.cat([each["age"].detach() for each in outputs])
        truth = torch.cat([each["age"] for each in targets])
        errors = (age.clamp(0, 116) - truth).abs()
        assert progress.running["age_mae_years"] == pytest.approx(float(errors[~truth.isnan()].mean()), rel=1e-5)
        gender = torch.cat([each["gender"] for each in targets])
        male = torch.cat([each["gender"].detach() for each in outputs]) > 0
        assert progress.running["gender_accuracy"] == pytest.approx(float((male == gender)[gender >= 0].float().mean()))
        race = torch.cat([each["race"] for each in targets])
        said = torch.cat([each["race"].detach() for each in outputs]).argmax(dim=1)
        assert progress.running["race_accuracy"] == pytest.approx(float((said == race)[race >= 0].float().mean()))
        assert 0.0 <= progress.data_wait_share < 1.0
        assert progress.samples_per_s > 0.0


def test_without_a_head_its_figure_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shown_in_an_epoch(monkeypatch, AugmentConfig(), tasks=("gender",))

    assert list(shown[-1].running) == ["gender_accuracy"]
    assert "gender" in shown[-1].figures()
    assert "age" not in shown[-1].figures()
    assert "race" not in shown[-1].figures()


def test_progress_is_a_line() -> None:
    assert PROGRESS.line() == (
        "epoch 3/24: 1,024 of 13,000, 0:01:27 left in this epoch, 0:34:30 left in this run, loss 2.803, "
        "age MAE 5.01 years, gender 92.8 %, race 82.0 %, 130 samples/s, 0% waiting for data"
    )


def test_the_remaining_time_is_never_negative() -> None:
    done = dataclasses.replace(PROGRESS, num_samples=14000)

    assert done.epoch_left == "0:00:00 left"
    assert done.run_left == f"{duration(21 * 13000 / 137.7)} left"
    assert duration(3725.4) == "1:02:05"


def test_after_one_step_no_time_is_estimated() -> None:
    first = dataclasses.replace(PROGRESS, steady_samples_per_s=None)

    assert "left" not in first.line()
    assert first.epoch_left == first.run_left == ""


def test_the_wait_for_the_first_batch_is_not_in_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shown_in_an_epoch(monkeypatch, AugmentConfig())

    assert shown[0].steady_samples_per_s is None
    for progress in shown[1:]:
        assert progress.steady_samples_per_s is not None
        assert progress.steady_samples_per_s > 0


def drawn(bars: TrainingBars) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with console.capture() as captured:
        console.print(bars)
    return captured.get()


def test_the_bars_show_the_same_values_as_the_line() -> None:
    bars = TrainingBars()
    assert drawn(bars) == "starting workers\n"
    bars.show(PROGRESS)

    epochs, epoch, figures = drawn(bars).splitlines()

    assert epochs.startswith("epochs")
    assert " 2/24 " in epochs
    assert epochs.rstrip().endswith("0:34:30 left")
    assert epoch.startswith("epoch 3")
    assert " 1024/13000 " in epoch
    assert figures.strip() == PROGRESS.figures()


def test_the_figures_wrap_in_a_narrow_terminal() -> None:
    bars = TrainingBars()
    bars.show(PROGRESS)
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None, soft_wrap=True)

    lines = console.render_lines(bars, console.options.update(no_wrap=True))

    texts = ["".join(segment.text for segment in line) for line in lines]
    assert all(len(text) <= 60 for text in texts)
    assert " ".join(" ".join(texts[2:]).split()) == PROGRESS.figures()


def test_epochs_of_larger_images_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_PROGRESS_S", 0.0)
    data = faces()
    job = TrainJob(
        model=ModelConfig(preset="lightweight", image_size=64),
        train=TrainConfig(epochs=3, batch_size=21, image_sizes=(32, 48, 64)),
    )
    network = MultiTaskNet(job.model, UTKFACE)
    network.initialise({"age": np.array([30.0, 70.0])})
    shown: list[Progress] = []

    context = LocalContext(data, data, 21, on_progress=shown.append)
    train(context, network, Transform(64, SIDE), job, Baseline.fit(Labels.from_arrays(UTKFACE, data)), NUM)

    later = [((48 / 32) ** 2 + 4) * NUM, (64 / 48) ** 2 * NUM, 0]
    assert [progress.num_later_samples for progress in shown] == pytest.approx(later)


def test_the_bars_go_back_when_a_run_is_resumed() -> None:
    bars = TrainingBars()
    bars.show(PROGRESS)
    bars.show(dataclasses.replace(PROGRESS, epoch=2, num_samples=64))

    assert " 1/24 " in drawn(bars)
    assert " 64/13000 " in drawn(bars)


def test_without_a_terminal_there_is_no_board() -> None:
    with progress_board(Console(file=io.StringIO())) as board:
        assert board is None
