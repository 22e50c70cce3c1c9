"""Estimate perceived age, gender and race from photographs of faces: train, tune, evaluate and run models on Ray.

    import agr_ray

    model = agr_ray.load("runs/lite/best")
    for face in model.predict("party.jpg").faces:
        print(face.box, face.age, face.age_interval, face.gender, face.race)

Names are imported when they are first used, so that `import agr_ray` is fast. `load`, `FaceModel.predict` and
`open_scores` start no Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agr_ray.config import CompareJob as CompareJob
    from agr_ray.config import EvaluateJob as EvaluateJob
    from agr_ray.config import PrepareJob as PrepareJob
    from agr_ray.config import RenderJob as RenderJob
    from agr_ray.config import ScoreJob as ScoreJob
    from agr_ray.config import TrainJob as TrainJob
    from agr_ray.config import TuneJob as TuneJob
    from agr_ray.predict.face_model import FaceModel as FaceModel
    from agr_ray.predict.face_model import load as load
    from agr_ray.predict.photo import Face as Face
    from agr_ray.predict.photo import Photo as Photo
    from agr_ray.runtime.compare import compare as compare
    from agr_ray.runtime.evaluate import evaluate as evaluate
    from agr_ray.runtime.prepare import prepare as prepare
    from agr_ray.runtime.render import render as render
    from agr_ray.runtime.score import score as score
    from agr_ray.runtime.train import train as train
    from agr_ray.runtime.tune import tune as tune
    from agr_ray.scoring.scores import Scores as Scores
    from agr_ray.scoring.scores import open_scores as open_scores

__version__ = "0.1.0"

_MODULES = {
    "load": "predict.face_model",
    "FaceModel": "predict.face_model",
    "Photo": "predict.photo",
    "Face": "predict.photo",
    "open_scores": "scoring.scores",
    "Scores": "scoring.scores",
    **dict.fromkeys(
        ("RenderJob", "PrepareJob", "TrainJob", "TuneJob", "CompareJob", "EvaluateJob", "ScoreJob"), "config"
    ),
    **{name: f"runtime.{name}" for name in ("render", "prepare", "train", "tune", "compare", "evaluate", "score")},
}

__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'agr_ray' has no attribute {name!r}")
    value = getattr(import_module(f"agr_ray.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
