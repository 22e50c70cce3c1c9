"""Evaluate: see `python jobs/evaluate.py --help`."""

from agr_ray.config import EvaluateJob
from agr_ray.runtime.command import run
from agr_ray.runtime.evaluate import evaluate

if __name__ == "__main__":
    run(EvaluateJob, evaluate)
