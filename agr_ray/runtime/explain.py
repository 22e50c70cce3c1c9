"""Sheets of faces that explain an evaluation: `agr-ray evaluate --explain`.

    OUT/explain/
      grad_cam_TASK.png      where right and wrong predictions come from
      worst_TASK.png         the worst predictions of each group of true labels
      nearest_features.png   measured images beside the training images that they are most like
      nearest_hash.png       the same by perceptual hash: a near-duplicate would be a leak
      nearest.parquet        schema.NEAREST: all measured images

The sheets show people and must not be published without their consent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy
from rich.console import Console

from agr_ray.config import ClusterConfig, EvaluateConfig, PredictConfig
from agr_ray.data.crops import POSE_COLUMNS, decoded_crops, read_images, read_labels, read_pose
from agr_ray.data.near_duplicates import MAX_DISTANCE
from agr_ray.data.prepared import PreparedSet
from agr_ray.evaluation.cases import all_rows, choose_cases, worst_by_group
from agr_ray.evaluation.nearest import Nearest
from agr_ray.evaluation.overlap import trained_codes
from agr_ray.labels import IntArray, LabelSpace
from agr_ray.models.checkpoint import Checkpoint
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.network_input import prepare_eval, to_nchw
from agr_ray.predict.crop_features import CropFeatures, feature_arrays
from agr_ray.predict.downloads import one_cpu
from agr_ray.predict.grad_cam import NoFeatureMap, grad_cam
from agr_ray.predict.prediction_rows import read_predictions
from agr_ray.progress_bar import progress
from agr_ray.runtime.cluster import cluster
from agr_ray.runtime.evaluation_workers import fitting_workers, map_parts, predicts_here
from agr_ray.schema import ATTRIBUTES, CROP_STATUSES, NEAREST
from agr_ray.storage import Storage

if TYPE_CHECKING:
    from agr_ray.report.explanations import Face

NUM_CASES: Final = 16
"""Right and wrong predictions of each task."""
NUM_WORST: Final = 6
"""Predictions of each group."""
NUM_PAIRS: Final = 24
_COLUMNS: Final = 8


@dataclass(frozen=True)
class Explanation:
    """A checkpoint, and the evaluation that it is about."""

    storage: Storage
    config: EvaluateConfig
    predict: PredictConfig
    cluster: ClusterConfig
    prepared: PreparedSet
    trained_on: PreparedSet
    """Set with the training images; often the same."""
    out: str
    """Folder of the evaluation."""
    loaded: Checkpoint
    model: MultiTaskNet
    checkpoint: dict[str, bytes]
    """Its files, as `portable_checkpoint`."""
    measured_in: LabelSpace
    """In which labels and predictions are compared."""
    predictions: pa.Table
    """schema.PREDICTIONS of the measured images."""

    @property
    def folder(self) -> str:
        """Return the folder of the sheets."""
        return self.storage.join(self.out, "explain")


def explain(test: Explanation, check_locks: Callable[[], None], console: Console) -> dict[str, Any]:
    """Draw all sheets, and return the section of metrics.json.

    Args:
        test: what to explain.
        check_locks: raises LockLost if another job has taken over.
        console: gets progress, and what was found.
    """
    from agr_ray.report.explanations import NOTE  # imports matplotlib, which only this needs

    _draw_cases(test, check_locks, console)
    nearest = _leak_check(test, check_locks, console)
    console.print(f"{test.folder}: {NOTE}")
    return {"nearest": nearest}


def _draw_cases(test: Explanation, check_locks: Callable[[], None], console: Console) -> None:
    """Write the sheets of predictions: Grad-CAM maps, and the worst of each group."""
    from agr_ray.report.explanations import Row, case_face, faces_sheet

    model, table = test.model, test.predictions
    labels = read_labels(table, test.measured_in)
    predictions = read_predictions(table, model.tasks, model.space)
    tasks = [task for task in ATTRIBUTES if task in model.tasks]
    rng = np.random.default_rng(0)
    cases = {task: choose_cases(labels, predictions, task, NUM_CASES, rng) for task in tasks}
    worst = {task: worst_by_group(labels, predictions, task, NUM_WORST) for task in tasks}
    image_ids = table["image_id"].to_pylist()
    shown = [rows for each in cases.values() for rows in each]
    shown += [each.wrong for groups in worst.values() for each in groups]
    if not len(all_rows(shown)):
        console.print("no sheets of predictions: no image has a label")
        return
    views = _Views(test, test.prepared, [image_ids[index] for index in all_rows(shown)])

    def faces(rows: IntArray, task: str, heats: NDArray[np.float32] | None = None) -> list[Face]:
        return [
            case_face(
                views.rgb(image_ids[row]), labels, predictions, task, int(row), None if heats is None else heats[place]
            )
            for place, row in enumerate(rows)
        ]

    problems = set()
    with progress(console, "drawing sheets", len(tasks)) as update:
        for number, task in enumerate(tasks, start=1):
            if not any(map(len, cases[task])):  # none has a label of this task
                continue
            try:
                rows = [
                    Row(title, faces(each, task, views.grad_cam([image_ids[row] for row in each], task)))
                    for title, each in zip(("right", "wrong"), cases[task], strict=True)
                ]
                what = "a higher age" if task == "age" else f"the predicted {task}"
                sheet = faces_sheet(rows, f"{task}: what speaks for {what}, by Grad-CAM", _COLUMNS)
                _write(test, check_locks, f"grad_cam_{task}", sheet)
            except NoFeatureMap as error:
                problems.add(f"no Grad-CAM maps: {error}")
            rows = [Row(f"{each.group}\n{each.n:,} images", faces(each.wrong, task)) for each in worst[task]]
            if rows:
                sheet = faces_sheet(rows, f"{task}: the worst predictions of each group", NUM_WORST)
                _write(test, check_locks, f"worst_{task}", sheet)
            update(number, "")
    for problem in problems:
        console.print(problem)


class _Views:
    """Images as the network sees them, by image_id."""

    def __init__(self, test: Explanation, prepared: PreparedSet, image_ids: Sequence[str]) -> None:
        rows = read_images(
            test.storage, prepared.parts(test.storage), sorted(image_ids), ("image_id", "crop", *POSE_COLUMNS)
        )
        self._model, transform = test.model, test.loaded.transform
        self._images = prepare_eval(to_nchw(decoded_crops(rows, prepared.crop_side_px), torch.device("cpu")), transform)
        self._pose = read_pose(rows)
        self._places = {image_id: place for place, image_id in enumerate(rows["image_id"].to_pylist())}
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (transform.mean, transform.std))
        shown = ((self._images * std + mean) * 255.0).round().clamp(0.0, 255.0).to(torch.uint8)
        self._rgb: NDArray[np.uint8] = shown.permute(0, 2, 3, 1).numpy()

    def rgb(self, image_id: str) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self._rgb[self._places[image_id]]
        return image

    def grad_cam(self, image_ids: Sequence[str], task: str) -> NDArray[np.float32]:
        """Return (n, side, side) heat maps.

        Raises:
            NoFeatureMap: as `grad_cam`.
        """
        places = [self._places[image_id] for image_id in image_ids]
        if not places:
            return np.empty((0, *self._rgb.shape[1:3]), np.float32)
        return grad_cam(self._model, self._images[places], task, self._pose[places])


def _leak_check(test: Explanation, check_locks: Callable[[], None], console: Console) -> dict[str, Any] | None:
    """Find the training images that the measured ones are most like; return counts, or None without training images."""
    codes = trained_codes(test.loaded.directory)
    measured = pa.concat_tables(_features(test, test.prepared, test.config.split, None)).sort_by("image_id")
    image_ids, features, hashes = feature_arrays(measured)
    nearest, num_trained = Nearest(features, hashes), 0
    with progress(console, "comparing with training images", None) as update:
        for part in _features(test, test.trained_on, "train" if codes is None else "all", codes):
            nearest.update(*feature_arrays(part))
            num_trained += part.num_rows
            check_locks()
            update(num_trained, "")
    if not num_trained:
        console.print(
            f"not compared with training images: {test.trained_on.uri} has none; --evaluate.explain_train_data names "
            "the set that has them"
        )
        return None
    _write_nearest(test, check_locks, image_ids, nearest)
    num_near = int((nearest.distance_bits <= MAX_DISTANCE).sum())
    console.print(
        f"{num_near:,} of {len(image_ids):,} test images may be copies of one of {num_trained:,} training images: "
        f"their hashes differ in at most {MAX_DISTANCE} of 64 bits. Most are other photographs: see nearest_hash.png, "
        "and the near-duplicates that agr-ray prepare counts"
    )
    return {
        "num_images": len(image_ids),
        "num_train_images": num_trained,
        "num_near": num_near,
        "near_bits": MAX_DISTANCE,
    }


def _write_nearest(
    test: Explanation, check_locks: Callable[[], None], image_ids: Sequence[str], nearest: Nearest
) -> None:
    """Write nearest.parquet and the sheets of the most alike pairs."""
    from agr_ray.report.explanations import Face, Pair, pairs_sheet

    keys = dict(zip(*(test.predictions[name].to_pylist() for name in ("image_id", "key")), strict=True))
    chosen = sorted({*nearest.by_features, *nearest.by_hash})
    found = read_images(test.storage, test.trained_on.parts(test.storage), chosen, ("image_id", "key"))
    train_keys = dict(zip(*(found[name].to_pylist() for name in ("image_id", "key")), strict=True))
    columns = (
        image_ids,
        [keys[image_id] for image_id in image_ids],
        [train_keys[image_id] for image_id in nearest.by_features],
        nearest.cosine,
        [train_keys[image_id] for image_id in nearest.by_hash],
        nearest.distance_bits.astype(np.int32),
    )
    table = pa.table(dict(zip(NEAREST.names, columns, strict=True)), schema=NEAREST)
    check_locks()
    test.storage.write_table(table, test.storage.join(test.folder, "nearest.parquet"))
    for name, title, closeness, partners, text in (
        ("nearest_features", "most alike to the network", -nearest.cosine, nearest.by_features, "cosine {:.3f}"),
        ("nearest_hash", "nearest perceptual hashes", nearest.distance_bits, nearest.by_hash, "{} bits apart"),
    ):
        rows = np.argsort(closeness, kind="stable")[:NUM_PAIRS]
        values = nearest.cosine if name == "nearest_features" else nearest.distance_bits
        own = _Views(test, test.prepared, [image_ids[row] for row in rows])
        others = _Views(test, test.trained_on, sorted({partners[row] for row in rows}))
        pairs = [
            Pair(
                Face(own.rgb(image_ids[row]), f"measured\n{text.format(values[row])}"),
                Face(others.rgb(partners[row]), "training image\n"),
            )
            for row in rows
        ]
        _write(test, check_locks, name, pairs_sheet(pairs, f"measured images beside training images: {title}"))


def _features(test: Explanation, prepared: PreparedSet, split: str, codes: Set[int] | None) -> Iterator[pa.Table]:
    """Yield rows of `crop_features.FEATURES`; a table has at least one."""
    config = test.config
    arguments = (
        *(test.storage, test.checkpoint, prepared.crop_side_px, split, codes, config.batch_size),
        *(test.predict, "cuda" if config.use_gpu else "cpu"),
    )
    num_rows = sum(prepared.counts.get(status, 0) for status in CROP_STATUSES)
    if predicts_here(config, num_rows):
        with one_cpu():
            yield from CropFeatures(*arguments)(pa.table({"part": prepared.parts(test.storage)}))
        return
    with cluster(test.cluster):
        num_workers, gpus = fitting_workers(config)
        pool = ActorPoolStrategy(size=num_workers)
        tables = map_parts(CropFeatures, arguments, test.storage, prepared, pool, gpus)
        yield from (table for table in tables if table.num_rows)


def _write(test: Explanation, check_locks: Callable[[], None], name: str, png: bytes) -> None:
    check_locks()
    test.storage.write(test.storage.join(test.folder, f"{name}.png"), png)
