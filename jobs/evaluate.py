"""`agr-ray evaluate` as a script, for `ray job submit -- python jobs/evaluate.py ...`: the same options."""

import sys

from agr_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
