"""Train: see `python jobs/train.py --help`."""

from agr_ray.config import TrainJob
from agr_ray.runtime.command import run
from agr_ray.runtime.train import train

if __name__ == "__main__":
    run(TrainJob, train)
