"""The model card: its description of a run, and what an evaluation adds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agr_ray.evaluation.audit import metrics_report
from agr_ray.evaluation.groups import GroupSums, class_counts
from agr_ray.evaluation.metrics import Baseline
from agr_ray.labels import UTKFACE, Labels
from agr_ray.models.card import model_card, with_measured

RNG = np.random.default_rng(0)
NUM_ROWS = 1000
# Half of them white men of 25; the rest spread out. Nobody is over 80, and 40 are Indian.
RACE = np.array([0] * 760 + [1] * 100 + [2] * 100 + [3] * 40)
TRUTH = Labels(
    UTKFACE,
    np.where(np.arange(NUM_ROWS) < 500, 25, RNG.integers(0, 80, NUM_ROWS)).astype(np.float32),
    (np.arange(NUM_ROWS) % 10 != 0).astype(np.int64),
    RACE,
)
GUESS = {
    "age": TRUTH.age + 3,
    "gender": np.where(RACE == 3, 1 - TRUTH.gender, TRUTH.gender).astype(np.float32),
    "race": np.eye(5, dtype=np.float32)[np.zeros(NUM_ROWS, int)],
}


def test_an_added_task_is_an_output_by_its_name() -> None:
    model = meta()["model"] | {"tasks": ["age", "smile"]}
    assert "\n- Output: smile.\n" in model_card(meta(model=model))


def meta(**changes: Any) -> dict[str, Any]:
    report = metrics_report(TRUTH, GUESS, baseline=Baseline.fit(TRUTH))
    groups = GroupSums(UTKFACE)
    groups.update(TRUTH, GUESS)
    report = {key: report[key] for key in ("n", "n_fallback", "age", "gender", "race", "baseline")}
    return {
        "model": {
            "backbone": "resnet18",
            "tasks": ["age", "gender", "race"],
            "age_head": "linear",
            "pretrained": "none",
        },
        "transform": {"template": "five_point_v1", "image_size": 88},
        "label_space": UTKFACE.to_json(),
        "data": {
            "uri": "s3://faces/prepared",
            "source": "utkface",
            "detector": "mtcnn",
            "split_manifest_sha256": "abcdef0123456789",
            "splits": {"train": 1000, "val": 50, "test": 70},
            "num_train_rows": NUM_ROWS,
            "num_train_fallback": 12,
            "train_labels": class_counts(TRUTH),
        },
        "metrics": {"epoch": 7, "val": {**report, "groups": groups.to_json()}},
        "config": {"train": {"lr": 0.002, "optimizer": "adamw", "out": "secret"}, "loss": {"race_weight": 2.0}},
        "git_commit": "c0ffee",
        "created": "2026-01-02T03:04:05+00:00",
        "versions": {"agr_ray": "0.1.0"},
        **changes,
    }


def evaluation(split: str = "test", seen: int | None = 0, manifest: str = "abcdef0123456789") -> dict[str, Any]:
    said = {"source": "utkface", "split": split, "split_manifest_sha256": manifest, "data": "data/utkface"}
    return metrics_report(TRUTH, GUESS) | {"evaluation": said | {"num_seen_in_training": seen}}


def test_the_terms_of_the_training_images_are_stated() -> None:
    utkface = meta()["data"] | {"licence": "UTKFace: for non-commercial research only"}

    assert "| terms of the images | UTKFace: for non-commercial research only |" in model_card(meta(data=utkface))
    assert "| terms of the images | not recorded; check that the data set's licence allows training" in model_card(
        meta()
    )


def section(card: str, heading: str) -> str:
    return card.partition(f"## {heading}")[2].partition("\n## ")[0]


def test_the_card_has_every_section_once() -> None:
    headings = [line for line in model_card(meta()).splitlines() if line.startswith("#")]

    assert headings == [
        "# Model card: perceived age, gender and race from a face",
        *(
            f"## {name}"
            for name in (
                "Input and output",
                "Training data",
                "Training",
                "Validation",
                "Calibration",
                "Intended uses",
                "Excluded uses",
                "The law, in outline",
                "Limits",
            )
        ),
    ]


def test_the_card_says_what_it_was_trained_on() -> None:
    data = section(model_card(meta()), "Training data")

    assert "| prepared set | s3://faces/prepared |" in data
    assert "| split manifest, SHA-256 | abcdef0123456789 |" in data
    assert "| images by split | train 1,000, val 50, test 70 |" in data
    assert "| faces found by | mtcnn |" in data
    assert "| race | indian | 40 | 4.0 % |" in data
    assert "| gender | female | 100 | 10.0 % |" in data


def test_the_card_lists_the_sets_where_there_are_several() -> None:
    of_one = {"source": "utkface", "uri": "s3://a", "split_manifest_sha256": "aa", "detector": "mtcnn", "share": 0.75}
    one = of_one | {"splits": {"train": 900, "val": 40}, "num_train_rows": 900}
    other = one | {"source": "adience", "uri": "s3://b", "num_train_rows": 100, "share": 0.25}

    data = section(model_card(meta(data=meta()["data"] | {"source": "utkface + adience", "sets": [one, other]})), "Tr")

    assert "| source | utkface + adience |" in data
    assert "| utkface | s3://a | aa | mtcnn | train 900, val 40 | 900 | 75.0 % |" in data
    assert "| adience | s3://b | aa | mtcnn | train 900, val 40 | 100 | 25.0 % |" in data
    assert "several prepared sets" not in model_card(meta())


def test_the_card_says_how_but_not_where_the_model_was_trained() -> None:
    training = section(model_card(meta()), "Training\n")

    assert "lr 0.002, optimizer adamw" in training
    assert "race_weight 2.0" in training
    assert "secret" not in training


def test_validation_is_reported_with_the_baseline_and_by_group() -> None:
    validation = section(model_card(meta()), "Validation")

    assert "After epoch 7, on 1,000 images" in validation
    assert "| age MAE | 3.00 years |" in validation
    # 40 of 1000 genders are wrong; always saying male is wrong for the women.
    assert "| gender accuracy | 96.00 % | 90.00 % |" in validation
    assert "| race | indian | 40 | 3.00 | +3.00 | 57.50 | 0.00 | 0.00 |" in validation
    assert "| race | others |" not in validation  # of whom there is none


def test_limitations_name_under_represented_groups() -> None:
    limits = section(model_card(meta()), "Limits")

    assert "race indian (40, 4.0 %)" in limits
    assert "race others (0, 0.0 %)" in limits
    assert "gender female (100, 10.0 %)" in limits
    assert "age group 81+ (0, 0.0 %)" in limits
    assert "race white" not in limits
    assert "perceived" in limits


def test_the_card_says_if_no_class_is_under_represented() -> None:
    even = {
        "gender": {"female": 500, "male": 500},
        "race": dict.fromkeys(("white", "black", "asian", "indian", "others"), 200),
        "age_group": dict.fromkeys(class_counts(TRUTH)["age_group"], 111),
    }

    assert "No class has fewer" in section(
        model_card(meta(data={"train_labels": even, "num_train_rows": 1000})), "Limits"
    )


@pytest.mark.parametrize("task", ["age", "gender", "race"])
def test_the_card_does_not_mention_a_task_without_a_head(task: str) -> None:
    model = {"backbone": "resnet18", "tasks": [task], "age_head": "linear", "pretrained": "none"}
    outputs = section(model_card(meta(model=model)), "Input and output")

    assert [line.split()[2].rstrip(":") for line in outputs.splitlines() if line.startswith("- Output:")] == [task]


def test_the_card_of_initial_weights_says_that_nothing_was_measured() -> None:
    card = model_card({key: value for key, value in meta().items() if key in ("model", "transform", "label_space")})

    assert "Unknown." in section(card, "Training data")
    assert "Not trained" in section(card, "Training\n")
    assert section(card, "Validation").strip() == "Not validated."


def test_a_vertical_bar_in_a_name_does_not_break_the_table() -> None:
    assert "| source | a\\|b |" in model_card(meta(data={"source": "a|b"}))


def test_an_evaluation_adds_intervals_and_groups_to_the_card() -> None:
    card = with_measured(model_card(meta()), evaluation())
    measured = section(card, "Measured on utkface, split test, abcdef01")

    assert card.startswith(model_card(meta()).rstrip())
    assert section(card, "Calibration").strip().startswith("Not calibrated: no age intervals and no abstention.")
    assert "None is a training image." in measured
    assert "| gender accuracy | 96.00 % |" in measured
    assert " to " in measured
    assert "| age group | 21-30 |" in measured


def test_the_card_says_what_the_checkpoint_is_calibrated_on() -> None:
    part = {"risk": 0.05}
    calibration = {"age": {"nominal": 0.9}, "gender": part, "race": None, "num_calibrated_on": 520, "warning": ""}
    metrics = evaluation() | {"calibration": calibration | {"notes": ["race: no labelled image"]}}
    metrics["calibration"]["age"] |= {"mae_years": 5.0, "mae_years_before": 5.0}

    card = with_measured(with_measured(model_card(meta()), metrics), metrics)

    assert section(card, "Calibration").strip().splitlines() == [
        "Calibrated on 520 images: intervals that should hold 90 % of true ages and an abstention from gender that "
        "should leave at most 5 % wrong.",
        "- race: no labelled image",
    ]
    assert card.count("## Calibration") == 1
    uncalibrated = evaluation("val")
    assert section(with_measured(card, uncalibrated), "Calibration") == section(card, "Calibration")


def test_the_same_evaluation_replaces_itself_and_no_other() -> None:
    once = with_measured(with_measured(model_card(meta()), evaluation("val")), evaluation("test"))
    again = with_measured(once, evaluation("val", seen=3))

    assert [line for line in again.splitlines() if line.startswith("## Measured")] == [
        "## Measured on utkface, split val, abcdef01",
        "## Measured on utkface, split test, abcdef01",
    ]
    assert "**3 of them are training images" in section(again, "Measured on utkface, split val")
    assert section(again, "Measured on utkface, split test") == section(once, "Measured on utkface, split test")
    assert with_measured(again, evaluation("val")) == once


def test_an_evaluation_without_training_hashes_says_so() -> None:
    assert "**It is not known" in with_measured(model_card(meta()), evaluation(seen=None))


def test_a_stress_test_adds_the_mean_and_the_worst_corruption() -> None:
    def measured(mae: float, gender: float) -> dict[str, Any]:
        return {"age_mae_years": {"value": mae}, "gender_accuracy": {"value": gender}}

    stress = {
        "num_images": 1500,
        "clean": measured(5.0, 0.95),
        "mean": measured(8.0, 0.8),
        "corruptions": {"blur": {"mean": measured(9.0, 0.85)}, "mask": {"mean": measured(7.0, 0.75)}},
    }
    card = with_measured(model_card(meta()), evaluation() | {"stress": stress})

    text = section(card, "Measured on utkface, split test")
    assert (
        "Corrupted copies of 1,500 of the images, by 2 corruptions of five severities each; means are over"
        in text.replace("\n", " ")
    )
    assert "| age MAE | 5.00 years | 8.00 years | 9.00 years (blur) |" in text
    assert "| gender accuracy | 95.00 % | 80.00 % | 75.00 % (mask) |" in text


def test_the_card_names_the_worst_and_best_groups_and_the_rates_at_age_thresholds() -> None:
    report = evaluation()
    measured = section(with_measured(model_card(meta()), report), "Measured on utkface, split test, abcdef01")

    # The race of everybody is predicted to be white, and the gender of Indians alone is wrong.
    assert "| race | gender accuracy | indian: 0.00 % | white: 100.00 % | 100.00 (" in measured
    assert "| gender | gender accuracy |" not in measured  # 96 % of both
    assert "| race | age MAE |" not in measured  # all ages are 3 years too high
    rates = report["age_thresholds"][0]
    row = next(line for line in measured.splitlines() if line.startswith("| 18 | 25 |"))
    assert f"{100 * rates['with_buffer']['false_adult_rate']:.2f} % (" in row
    assert f"| {rates['with_buffer']['n_minor']:,} |" in row
    assert "| gender AUC | 0." in measured
    assert "| race calibration error |" in measured
    assert "no face found" not in section(model_card(meta()), "Validation")


def test_the_card_says_if_the_images_show_no_difference() -> None:
    perfect = {"age": TRUTH.age, "gender": TRUTH.gender.astype(np.float32), "race": np.eye(5, dtype=np.float32)[RACE]}
    said = evaluation()["evaluation"]
    card = with_measured("# Card\n", metrics_report(TRUTH, perfect) | {"evaluation": said})
    assert "No significant difference between groups was found in age MAE" in card
