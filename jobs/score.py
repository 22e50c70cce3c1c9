"""`agr-ray score` as a script, for `ray job submit -- python jobs/score.py ...`: the same options."""

import sys

from agr_ray.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
