"""Sets with other races and age groups than UTKFace's, from their published files to demographic tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy_registry
from published_sets import write_adience, write_fairface
from sets import SIDE_PX, checkpoint, prepared_set

from agr_ray.config import (
    EvaluateConfig,
    EvaluateJob,
    GatesConfig,
    ModelConfig,
    PrepareConfig,
    PrepareJob,
    ScoreConfig,
    ScoreJob,
    SourceConfig,
    SplitConfig,
    TrainConfig,
    TrainJob,
    VisionConfig,
)
from agr_ray.data.prepared import PreparedSet
from agr_ray.errors import ConfigError
from agr_ray.labels import ADIENCE, FAIRFACE, RACE_MAPPINGS, UTKFACE, LabelSpace
from agr_ray.runtime.evaluate import evaluate
from agr_ray.runtime.prepare import prepare
from agr_ray.runtime.score import score
from agr_ray.runtime.train import train

pytestmark = pytest.mark.usefixtures("ray_cluster")

VISION = VisionConfig(detector="haar")


def prepared(folder: Path, kind: str) -> PreparedSet:
    return prepare(
        PrepareJob(
            source=SourceConfig(kind=kind, uri=str(folder / "source")),  # type: ignore[arg-type]
            split=SplitConfig(val=0.3, test=0.2),
            vision=VISION,
            prepare=PrepareConfig(out=str(folder / "set"), crop_side_px=SIDE_PX, num_workers=1),
        )
    )


def trained(folder: Path, **model: Any) -> str:
    return train(
        TrainJob(
            model=ModelConfig(image_size=SIDE_PX, **model),
            train=TrainConfig(
                data=str(folder / "set"),
                out=str(folder / "runs"),
                num_workers=1,
                threads_per_worker=1,
                batch_size=16,
                epochs=1,
                balance="cells",
            ),
        )
    )


def measured(folder: Path, model: str, split: str, **changes: Any) -> dict[str, Any]:
    config = {"checkpoint": model, "data": str(folder / "set"), "split": split, "abstain_risk": 0.9}
    return evaluate(EvaluateJob(evaluate=EvaluateConfig(**config | changes)))  # type: ignore[arg-type]


def scored(folder: Path, model: str, photographs: str) -> tuple[list[dict[str, Any]], pa.Table]:
    """Score photographs; return their faces and the demographic table."""
    score(
        ScoreJob(
            gates=GatesConfig(min_side_px=1, min_sharpness=0.0, min_detector_score=0.0, max_turn_degrees=180.0),
            score=ScoreConfig(
                checkpoint=model,
                input=str(folder / "source" / photographs),
                out=str(folder / "scores"),
                num_workers=1,
                min_cell=0,
            ),
        )
    )
    tables = {name: pq.read_table(folder / "scores" / name) for name in ("faces", "demographics")}
    return tables["faces"].to_pylist(), tables["demographics"]


def check_tables(faces: list[dict[str, Any]], demographics: pa.Table, space: LabelSpace) -> None:
    """Hold that every class of the space has its row in each breakdown, and that every face is counted."""
    rows = demographics.to_pylist()
    attributes = list(space.classes)
    for attribute, names in space.classes.items():
        chosen = [row for row in rows if row["breakdown"] == attribute]
        assert [row[attribute] for row in chosen] == list(names)
        assert sum(row["n"] for row in chosen) + chosen[0]["num_abstained"] == len(faces)
    assert sorted({row["breakdown"] for row in rows}) == sorted([*attributes, ",".join(attributes)])


def test_fairface_from_its_files_to_tables(tmp_path: Path) -> None:
    write_fairface(tmp_path / "source", num_train=60, num_val=20)

    made = prepared(tmp_path, "fairface")
    assert made.label_space == FAIRFACE
    assert made.splits["test"] == 20
    assert made.splits["train"] + made.splits["val"] == 60
    assert made.splits["val"] > 10

    model = trained(tmp_path, backbone="plain_cnn", age_head="distribution")
    meta = json.loads((Path(model) / "meta.json").read_text())
    assert meta["label_space"] == FAIRFACE.to_json()
    assert list(meta["data"]["train_labels"]["race"]) == list(FAIRFACE.races)
    assert sum(meta["data"]["train_labels"]["age_group"].values()) == made.splits["train"]
    assert meta["metrics"]["val"]["age"]["n_range"] == made.splits["val"]

    metrics = measured(tmp_path, model, "val", calibrate=True)
    assert (metrics["age"]["n"], metrics["age"]["n_range"]) == (0, made.splits["val"])
    assert (metrics["age"]["mae_years"], metrics["intervals"]["age"]["mae_years"]) == (None, None)
    assert metrics["age"]["exact_group"] <= metrics["age"]["one_off"] <= 1.0
    assert metrics["labels"]["race"] == list(FAIRFACE.races)
    assert [len(row) for row in metrics["race"]["confusion"]] == [7] * 7
    assert metrics["calibration"]["age"] is None
    assert any("an age range, which has no error" in note for note in metrics["calibration"]["notes"])
    assert metrics["evaluation"]["label_mapping"] is None
    card = (Path(model) / "model_card.md").read_text()
    assert "| age group | 70+ |" in card
    assert f"{made.splits['val']:,} an age range" in card

    assert measured(tmp_path, model, "test")["calibration"]["num_calibrated_on"] == made.splits["val"]

    faces, demographics = scored(tmp_path, model, "val")
    assert faces
    for face in faces:
        assert [race for race, _ in face["race_probs"]] == list(FAIRFACE.races)
        assert face["race"] == max(face["race_probs"], key=lambda pair: pair[1])[0]
        assert face["age_low"] is None
    check_tables(faces, demographics, FAIRFACE)

    # UTKFace's five races on FairFace's seven, and the other way round.
    other = checkpoint(tmp_path / "other")
    metrics = measured(tmp_path, str(other), "test", allow_overlap=True)
    assert metrics["evaluation"]["label_mapping"] == {
        "from": "fairface",
        "races": dict(RACE_MAPPINGS["fairface", "utkface"]),
        "age_groups": list(FAIRFACE.age_groups),
    }
    assert metrics["labels"] == {key: list(names) for key, names in FAIRFACE.classes.items()} | {
        "race": list(UTKFACE.races)
    }
    truth = pq.read_table(next(tmp_path.glob("other-eval-*")) / "predictions.parquet")["race"].to_pylist()
    assert set(truth) <= set(UTKFACE.races)
    assert metrics["race"]["n"] == len(truth) == made.splits["test"]
    assert "Their label space is fairface" in (other / "model_card.md").read_text()
    prepared_set(tmp_path / "utkface" / "set", {"train": 2, "val": 4, "test": 4})
    with pytest.raises(ConfigError, match=r"the races of utkface .* do not map onto those of fairface"):
        measured(tmp_path / "utkface", model, "test")


def test_adience_from_its_files_to_tables_with_added_parts(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    write_adience(tmp_path / "source", num_users=20, num_each=4)

    made = prepared(tmp_path, "adience")
    assert made.label_space == ADIENCE
    rows = pq.read_table(tmp_path / "set" / "manifest.parquet").to_pylist()
    assert {row["group_id"] for row in rows} == {f"subject:{user}@N01" for user in range(20)}
    assert len({(row["group_id"], row["split"]) for row in rows}) == 20
    assert [row["age"] is None for row in rows].count(False) == 8

    toy_registry.register()  # as each of Ray's workers does
    request.addfinalizer(toy_registry.unregister)
    model = trained(tmp_path, backbone="patches", attention="gain", age_head="log", tasks=("age", "gender"))
    metrics = measured(tmp_path, model, "val", calibrate=True)
    num_exact = sum(row["split"] == "val" and row["age"] is not None for row in rows)
    assert metrics["age"]["n"] == num_exact
    assert metrics["age"]["n"] + metrics["age"]["n_range"] == made.splits["val"]
    nothing = dict.fromkeys(("accuracy", "balanced_accuracy", "auc", "ece", "overconfidence"))
    assert metrics["race"] == {"n": 0, "confusion": [], **nothing}
    assert metrics["labels"] == {"age_group": list(ADIENCE.age_groups), "gender": ["female", "male"], "race": []}
    assert "race" not in (Path(model) / "model_card.md").read_text().split("## Validation")[1].split("|")[0]

    faces, demographics = scored(tmp_path, model, "faces")
    assert faces
    assert all(face["race"] is None and face["race_probs"] is None for face in faces)
    check_tables(faces, demographics, ADIENCE)
