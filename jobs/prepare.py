"""Prepare: see `python jobs/prepare.py --help`."""

from agr_ray.config import PrepareJob
from agr_ray.runtime.command import run
from agr_ray.runtime.prepare import prepare

if __name__ == "__main__":
    run(PrepareJob, prepare)
