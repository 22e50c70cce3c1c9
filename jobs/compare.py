"""`agr-ray compare` as a script, for `ray job submit -- python jobs/compare.py ...`: the same options."""

import sys

from agr_ray.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
