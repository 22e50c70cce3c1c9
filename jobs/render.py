"""Render: see `python jobs/render.py --help`."""

from agr_ray.config import RenderJob
from agr_ray.runtime.command import run
from agr_ray.runtime.render import render

if __name__ == "__main__":
    run(RenderJob, render)
