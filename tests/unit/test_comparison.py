"""Comparisons of networks: estimates, intervals and paired differences."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from agr_ray.config.presets import PRESETS
from agr_ray.errors import ConfigError
from agr_ray.evaluation.comparison import METRICS, compare
from agr_ray.labels import UTKFACE, Labels
from agr_ray.models.predictions import Predictions
from agr_ray.report.charts import label_heights
from agr_ray.report.comparison import _samples_per_s
from agr_ray.report.comparison_page import comparison_report, history_columns
from agr_ray.report.comparison_rows import cited, difference_text, estimates_of, metric_columns, text
from agr_ray.report.page_files import write_page
from agr_ray.report.page_html import page_html
from agr_ray.report.page_markdown import page_markdown
from agr_ray.schema import COMPARED_METRICS, COMPARISON
from agr_ray.storage import Storage

NUM_IMAGES = 300
RNG = np.random.default_rng(0)
AGES = RNG.integers(1, 90, NUM_IMAGES).astype(np.float32)
LABELS = Labels(UTKFACE, AGES, RNG.integers(0, 2, NUM_IMAGES), RNG.integers(0, 5, NUM_IMAGES))
APART = np.arange(NUM_IMAGES)


def guessed(error_years: float, share_right: float, seed: int) -> Predictions:
    """Return predictions with a mean error and a share of correct classes."""
    rng = np.random.default_rng(seed)
    is_right = rng.random(NUM_IMAGES) < share_right
    races = np.where(is_right, LABELS.race, (LABELS.race + 1) % 5)
    signs = rng.choice([-1.0, 1.0], NUM_IMAGES)
    return {
        "age": (AGES + signs * rng.exponential(error_years, NUM_IMAGES)).clip(0, 116).astype(np.float32),
        "gender": np.where(is_right, LABELS.gender, 1 - LABELS.gender).astype(np.float32),
        "race": np.eye(5, dtype=np.float32)[races],
    }


def test_the_metrics_are_those_of_the_table() -> None:
    assert tuple(METRICS) == COMPARED_METRICS


def test_a_value_is_the_mean_over_runs_and_lies_in_its_interval() -> None:
    runs = [guessed(6.0, 0.8, 1), guessed(9.0, 0.7, 2)]
    estimates = compare({"paper": runs}, LABELS, APART, "paper")["paper"]

    errors = [np.abs(run["age"] - AGES).mean() for run in runs]
    assert estimates["age_mae_years"].value == pytest.approx(np.mean(errors))
    right = [(run["race"].argmax(axis=1) == LABELS.race).mean() for run in runs]
    assert estimates["race_accuracy"].value == pytest.approx(np.mean(right))
    for estimate in estimates.values():
        assert estimate.interval[0] < estimate.value < estimate.interval[1]
        assert (estimate.difference, estimate.differs) == (None, False)


def test_intervals_are_students_with_the_variance_between_seeds() -> None:
    """Three runs of equal errors in all images: no variance over images, and one between seeds."""
    labels = Labels(UTKFACE, np.full(4, 40.0, np.float32), np.zeros(4, np.int64), np.zeros(4, np.int64))
    errors = {"paper": [5.0, 6.0, 7.0], "cbam": [4.0]}
    runs = {name: [{"age": np.full(4, 40.0 + error, np.float32)} for error in each] for name, each in errors.items()}
    estimates = compare(runs, labels, np.arange(4), "paper")
    t = 4.302653  # 97.5 % quantile, 2 degrees of freedom

    paper, cbam = estimates["paper"]["age_mae_years"], estimates["cbam"]["age_mae_years"]
    assert paper.interval == pytest.approx((6.0 - t / 3**0.5, 6.0 + t / 3**0.5), rel=1e-5)
    assert cbam.interval == pytest.approx((0.0, 4.0 + t), rel=1e-5)  # an error is not negative
    half = t * (1 + 1 / 3) ** 0.5
    assert cbam.difference_interval == pytest.approx((-2.0 - half, -2.0 + half), rel=1e-5)


def test_intervals_over_seeds_hold_the_true_difference_as_often_as_they_say() -> None:
    """Two networks with the same mean, two seeds each, and far more variance between seeds than over images."""
    rng = np.random.default_rng(7)
    labels = Labels(UTKFACE, np.full(20, 40.0, np.float32), np.zeros(20, np.int64), np.zeros(20, np.int64))

    def run(error: float) -> Predictions:
        return {"age": (40.0 + error + rng.normal(0, 0.1, 20)).astype(np.float32)}

    num_covered = 0
    for _ in range(200):
        runs = {name: [run(10.0 + rng.normal()) for _ in range(2)] for name in ("paper", "cbam")}
        estimates = compare(runs, labels, np.arange(20), "paper", num_resamples=50)
        num_covered += not estimates["cbam"]["age_mae_years"].differs
    assert 180 <= num_covered <= 199


def test_the_best_of_many_equal_networks_is_seldom_called_different() -> None:
    """A reference and 12 networks, whose errors differ by chance only. Without the correction, a quarter is wrong."""
    rng = np.random.default_rng(7)
    missing = np.zeros(100, np.int64)
    labels = Labels(UTKFACE, np.full(100, 40.0, np.float32), missing, missing)
    num_wrong = 0
    for _ in range(200):
        runs: dict[str, list[Predictions]] = {
            f"network {number}": [{"age": (50.0 + rng.normal(0, 3.0, 100)).astype(np.float32)}] for number in range(13)
        }
        estimates = compare(runs, labels, np.arange(100), "network 0", num_resamples=200)
        best = min(estimates, key=lambda name: estimates[name]["age_mae_years"].value)
        num_wrong += estimates[best]["age_mae_years"].differs
    assert num_wrong <= 15


def test_the_adjusted_interval_makes_up_for_the_number_of_networks() -> None:
    labels = Labels(UTKFACE, np.full(4, 40.0, np.float32), np.zeros(4, np.int64), np.zeros(4, np.int64))
    errors = {"paper": [5.0, 6.0, 7.0], "cbam": [4.0], "se": [5.0], "mhsa": [6.0]}
    runs = {name: [{"age": np.full(4, 40.0 + error, np.float32)} for error in each] for name, each in errors.items()}
    cbam = compare(runs, labels, np.arange(4), "paper")["cbam"]["age_mae_years"]

    half = 7.6488 * (1 + 1 / 3) ** 0.5  # Student's t: 2 degrees of freedom, 5 % / 3 in both tails
    assert cbam.adjusted_interval == pytest.approx((-2.0 - half, -2.0 + half), rel=1e-4)
    assert cbam.difference_interval == pytest.approx(
        (-2.0 - 4.302653 * (4 / 3) ** 0.5, -2.0 + 4.302653 * (4 / 3) ** 0.5)
    )


@pytest.mark.parametrize("num_images", [10, 200])
def test_intervals_of_runs_that_only_err_on_other_images_are_neither_too_narrow_nor_far_too_wide(
    num_images: int,
) -> None:
    """Each run errs by an error of its own for each image, and no seed is better than another."""
    rng = np.random.default_rng(7)
    missing = np.zeros(num_images, np.int64)
    labels = Labels(UTKFACE, np.full(num_images, 40.0, np.float32), missing, missing)

    def run() -> Predictions:
        return {"age": (50.0 + rng.normal(0, 3.0, num_images)).astype(np.float32)}

    num_covered = 0
    for _ in range(200):
        runs = {name: [run(), run()] for name in ("paper", "cbam")}
        estimates = compare(runs, labels, np.arange(num_images), "paper", num_resamples=100)
        num_covered += not estimates["cbam"]["age_mae_years"].differs
    assert 182 <= num_covered <= 199


def test_a_metric_says_whether_its_intervals_hold_seeds() -> None:
    ages = [{"age": guessed(8.0, 0.8, seed)["age"]} for seed in (1, 2)]
    estimates = compare({"single_task_age": ages, "paper": [guessed(8.0, 0.8, 1)]}, LABELS, APART, "paper")

    assert {metric: each.includes_seeds for metric, each in estimates["paper"].items()} == {
        "age_mae_years": True,
        "age_within_5": True,
        "age_one_off": True,
        "gender_accuracy": False,
        "race_accuracy": False,
    }


def test_one_person_has_no_interval() -> None:
    runs = {"paper": [guessed(8.0, 0.8, 1)], "cbam": [guessed(6.0, 0.9, 2)]}
    assert compare(runs, LABELS, np.zeros(NUM_IMAGES), "paper") == {"paper": {}, "cbam": {}}


def test_seeds_that_differ_widen_the_interval() -> None:
    def width(*seeds_and_errors: tuple[int, float]) -> float:
        runs = [guessed(error, 0.8, seed) for seed, error in seeds_and_errors]
        low, high = compare({"paper": runs}, LABELS, APART, "paper")["paper"]["age_mae_years"].interval
        return high - low

    assert width((1, 5.0), (2, 12.0)) > 2 * width((1, 8.0), (2, 8.0))


def test_a_paired_difference_is_surer_than_two_intervals_apart() -> None:
    base = guessed(8.0, 0.8, 1)
    better = dict(base) | {"age": (AGES + 0.9 * (base["age"] - AGES)).astype(np.float32)}
    estimates = compare({"paper": [base], "cbam": [better]}, LABELS, APART, "paper")
    paper, cbam = estimates["paper"]["age_mae_years"], estimates["cbam"]["age_mae_years"]

    assert paper.interval[0] < cbam.interval[1]  # the intervals overlap
    assert cbam.difference == pytest.approx(cbam.value - paper.value)
    assert cbam.differs
    assert not estimates["cbam"]["race_accuracy"].differs


def test_images_of_one_person_count_together() -> None:
    """Six images of each person with the same error are no more certain than one."""
    few = np.repeat(np.abs(np.random.default_rng(3).normal(0, 8, NUM_IMAGES // 6)), 6).astype(np.float32)
    runs: dict[str, list[Predictions]] = {"paper": [{"age": AGES + few}]}

    def width(clusters: np.ndarray) -> float:
        low, high = compare(runs, LABELS, clusters, "paper")["paper"]["age_mae_years"].interval
        return high - low

    assert width(APART // 6) == pytest.approx(6**0.5 * width(APART), rel=0.1)


def test_a_network_without_a_task_has_no_such_metric() -> None:
    ages_only = {"age": guessed(8.0, 0.8, 1)["age"]}
    estimates = compare({"single_task_age": [ages_only]}, LABELS, APART, "paper")["single_task_age"]

    assert list(estimates) == ["age_mae_years", "age_within_5", "age_one_off"]
    assert estimates["age_mae_years"].difference is None


def test_estimates_are_shown_with_their_unit() -> None:
    runs = {"paper": [guessed(8.0, 0.8, 1)], "cbam": [guessed(6.0, 0.9, 2)]}
    estimates = compare(runs, LABELS, APART, "paper")["cbam"]

    assert text("age_mae_years", estimates["age_mae_years"]).startswith(f"{estimates['age_mae_years'].value:.2f} (")
    assert text("race_accuracy", estimates["race_accuracy"]).startswith(f"{100 * estimates['race_accuracy'].value:.1f}")
    assert difference_text("race_accuracy", estimates["race_accuracy"])[0] in "+-"
    assert text("race_accuracy", None) == difference_text("race_accuracy", None) == ""


def test_the_papers_figures_are_those_of_its_tables() -> None:
    assert cited("ldl", "age_mae_years") == 4.20
    assert cited("sa_net", "race_accuracy") == 0.91
    assert cited("faceage", "gender_accuracy") is None
    assert cited("vit", "age_mae_years") is None
    assert cited("ldl", "age_within_5") is None
    assert len([preset for preset in PRESETS.values() if preset.cited is not None]) == 16


# The page

HOSTILE = "<script>alert(1)</script>"


def compared(
    folder: Path,
    runs: dict[str, list[Predictions]],
    failures: dict[str, str] | None = None,
    labels: Labels = LABELS,
    commits: dict[str, str] | None = None,
) -> Path:
    """Write the files of a comparison of some runs."""
    estimates = compare(runs, labels, APART, "paper", num_resamples=50) if runs else {}
    failed = failures or {}
    rows: list[dict[str, Any]] = []
    for preset in [*runs, *failed]:
        seeds = list(range(len(runs.get(preset, []))))
        about = {
            "preset": preset,
            "seeds": seeds,
            "failures": [f"{preset}-0: {failed[preset]}"] if preset in failed else [],
        }
        about |= {"side_px": 64, "parameters": 1_500_000, "multiply_adds": 2_000_000}
        rows.append({**about, **metric_columns(preset, estimates.get(preset, {}))})
        for seed in seeds:
            history = pa.table({"epoch": [1, 2, 3], "val_age_mae_years": [12.0, None, 9.0]})
            run = folder / "runs" / f"{preset}-{seed}"
            run.mkdir(parents=True)
            Storage().write_table(history, str(run / "history.parquet"))
    Storage().write_table(pa.Table.from_pylist(rows, COMPARISON), str(folder / "comparison.parquet"))
    settings = {"train": {"epochs": 40, "optimizer": HOSTILE}, "split": "test", "data": "abc", "presets": {}}
    (folder / "comparison.json").write_text(json.dumps(settings))
    measured: dict[str, Any] = {
        "data": f"/faces/{HOSTILE}",
        "split_manifest_sha256": "ab" * 32,
        "num_images": NUM_IMAGES,
    }
    measured |= {"reference": "paper", "machine": "a CPU", "commits": commits or {}}
    (folder / "measured.json").write_text(json.dumps(measured))
    return folder


def markdown(folder: Path) -> str:
    return page_markdown(comparison_report(Storage(), str(folder)), "figures")


def test_the_columns_of_a_row_hold_the_estimates() -> None:
    runs = {"paper": [guessed(8.0, 0.8, 1), guessed(8.0, 0.8, 3)], "cbam": [guessed(6.0, 0.9, 2)]}
    runs["se"] = [guessed(7.0, 0.9, 3)]
    estimates = compare(runs, LABELS, APART, "paper")

    for preset in runs:
        about = {"preset": preset, "seeds": [0], "failures": [], "side_px": 1, "parameters": 1, "multiply_adds": 1}
        (row,) = pa.Table.from_pylist([about | metric_columns(preset, estimates[preset])], COMPARISON).to_pylist()
        assert estimates_of(row, frozenset(COMPARED_METRICS)) == estimates[preset]


def test_the_page_says_who_is_best_and_whether_the_difference_is_significant(tmp_path: Path) -> None:
    runs = {"paper": [guessed(9.0, 0.8, 1)], "cbam": [guessed(4.0, 0.8, 2)], "se": [guessed(9.0, 0.8, 3)]}
    page = markdown(compared(tmp_path, runs))

    assert "cbam has the lowest age MAE" in page
    assert "which is a significant difference" in page
    differences = page[page.index("## Differences") : page.index("## Course")]
    rows = [line.split(" | ") for line in differences.splitlines() if line.startswith("| ")][2:]
    assert [(row[0], row[1].startswith("**")) for row in rows] == [("| cbam", True), ("| se", False)]
    assert "do not include the variance between seeds" in page
    assert "| ldl |" not in page
    assert "| paper (reference) | 1 |" in page
    assert "| cbam |  |" not in page[page.index("## As the paper cites") :]  # nothing is cited for it


def test_a_second_seed_of_one_preset_is_told_for_all(tmp_path: Path) -> None:
    page = markdown(
        compared(tmp_path, {"paper": [guessed(9.0, 0.8, 1), guessed(9.0, 0.8, 2)], "se": [guessed(9.0, 0.8, 3)]})
    )

    assert "of age MAE, within 5 years, one-off, gender, race, over seeds" in page
    assert "do not include the variance between seeds" not in page


def test_the_page_shows_and_judges_by_corrected_intervals(tmp_path: Path) -> None:
    """One of 12 differences, which alone would be significant."""
    runs = {"paper": [guessed(9.0, 0.8, 1)], "cbam": [guessed(7.6, 0.8, 2)]}
    alone = markdown(compared(tmp_path / "alone", runs))
    presets = [preset for preset in PRESETS if preset not in ("paper", "cbam", "faceage")][:11]
    page = markdown(compared(tmp_path / "many", runs | {name: [guessed(9.0, 0.8, 1)] for name in presets}))

    assert "which is a significant difference" in alone
    assert "corrected" not in alone
    assert "cbam has the lowest age MAE" in page
    assert "but the difference is not significant" in page
    assert "corrected for 12 differences (Bonferroni)" in page
    (cell,) = (line.split(" | ")[1] for line in page.splitlines() if line.startswith("| cbam | -"))
    low, high = (float(end) for end in cell.partition("(")[2].rstrip(")").split(" to "))
    assert low < 0.0 < high


def test_networks_are_ranked_by_one_off_if_no_image_has_an_exact_age(tmp_path: Path) -> None:
    ages = np.full(NUM_IMAGES, np.nan, np.float32)
    ranges = UTKFACE.age_groups
    lows = np.asarray([float(group.partition("-")[0]) for group in ranges[:-1]], np.float32)
    group = np.searchsorted(lows, AGES, side="right").clip(1, len(lows) - 1) - 1
    labels = Labels(UTKFACE, ages, LABELS.gender, LABELS.race, lows[group], lows[group + 1] - 1)
    runs = {"paper": [guessed(20.0, 0.8, 1)], "cbam": [guessed(4.0, 0.8, 2)]}
    page = markdown(
        compared(tmp_path, runs | {"single_task_race": [{"race": runs["paper"][0]["race"]}]}, labels=labels)
    )

    assert "No image has an exact age, so one-off accuracy ranks the networks. cbam has the highest" in page
    assert "which is a significant difference" in page
    assert "One-off accuracy with 95 % intervals" in page
    assert "No network predicts age" not in page


def test_a_comparison_without_ages_says_so(tmp_path: Path) -> None:
    page = markdown(compared(tmp_path, {"single_task_race": [{"race": guessed(9.0, 0.8, 1)["race"]}]}))

    assert "Age was not measured" in page


def test_runs_of_different_commits_are_told(tmp_path: Path) -> None:
    runs = {"paper": [guessed(9.0, 0.8, 1)], "se": [guessed(9.0, 0.8, 3)]}
    same = markdown(compared(tmp_path / "same", runs, commits={"paper-0": "abc", "se-0": "abc"}))
    page = markdown(compared(tmp_path / "other", runs, commits={"paper-0": "abc", "se-0": "def+"}))

    assert "different versions of the code" not in same
    assert "different versions of the code, which may explain a difference: abc (paper-0); def+ (se-0)" in page


def test_a_method_that_is_not_measured_as_a_whole_is_told(tmp_path: Path) -> None:
    page = markdown(compared(tmp_path, {"faceage": [{"age": guessed(9.0, 0.8, 1)["age"]}]}))

    assert "faceage is measured without the calibration of ages" in page


def test_failures_are_told_and_hostile_text_is_escaped(tmp_path: Path) -> None:
    folder = compared(tmp_path, {"paper": [guessed(9.0, 0.8, 1)]}, {"vit": f"loss nan {HOSTILE}"})
    html = page_html(comparison_report(Storage(), str(folder)))

    assert "1 run failed" in html
    assert html.count("<script>") == 1
    assert html.count("&lt;script&gt;alert(1)&lt;") == 3


def test_a_comparison_of_which_all_runs_failed_has_a_page(tmp_path: Path) -> None:
    page = markdown(compared(tmp_path, {}, {"vit": "loss nan"}))

    assert "No network was measured." in page
    assert "| vit-0 | loss nan |" in page


def test_a_preset_keeps_its_page_without_its_runs(tmp_path: Path) -> None:
    """The same page comes from the folder again, whose runs may have been deleted."""
    folder = compared(tmp_path, {"paper": [guessed(9.0, 0.8, 1)], "se": [guessed(8.0, 0.8, 3)]})
    write_page(Storage(), str(folder), comparison_report(Storage(), str(folder)))
    first = (folder / "report.html").read_text()

    assert page_html(comparison_report(Storage(), str(folder))) == first
    (folder / "runs" / "se-0" / "history.parquet").unlink()
    assert "Course of training" in page_html(comparison_report(Storage(), str(folder)))


def test_a_folder_without_a_comparison_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no finished comparison; there are no comparison\.parquet"):
        comparison_report(Storage(), str(tmp_path))

    folder = compared(tmp_path, {"paper": [guessed(9.0, 0.8, 1)]})
    (folder / "measured.json").write_text("{}")
    with pytest.raises(ConfigError, match="not written by agr-ray compare, or damaged"):
        comparison_report(Storage(), str(folder))


def test_labels_of_networks_of_the_same_work_keep_their_distance() -> None:
    points = [(334.0, 10.4), (334.0, 10.5), (341.0, 10.45), (340.0, 10.4), (5.0, 10.42), (1459.0, 13.4)]
    heights = label_heights(points)

    same_work = sorted(heights[:4])
    assert min(high - low for low, high in itertools.pairwise(same_work)) > 0.15
    assert [sorted(range(4), key=values.__getitem__)[-1] for values in (heights, [y for _, y in points])] == [1, 1]
    assert heights[4:] == [10.42, 13.4]
    assert label_heights([(1.0, 2.0), (1.0, 2.0)])[0] < 2.0


def test_no_result_needs_the_histories_of_the_runs(tmp_path: Path) -> None:
    assert history_columns(Storage(), str(tmp_path), "paper-0", "epoch", "samples_per_s") == [[], []]
    assert _samples_per_s(Storage(), str(tmp_path), ["paper-0"]) is None
