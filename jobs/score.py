"""Score: see `python jobs/score.py --help`."""

from agr_ray.config import ScoreJob
from agr_ray.runtime.command import run
from agr_ray.runtime.score import score

if __name__ == "__main__":
    run(ScoreJob, score)
