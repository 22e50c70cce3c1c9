"""Search for better settings: see `python jobs/tune.py --help`."""

from agr_ray.config import TuneJob
from agr_ray.runtime.command import run
from agr_ray.runtime.tune import tune

if __name__ == "__main__":
    run(TuneJob, tune)
