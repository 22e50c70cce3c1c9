"""`agr-ray cross-validate` as a script, for `ray job submit -- python jobs/cross_validate.py ...`: the same options."""

import sys

from agr_ray.cli import main

if __name__ == "__main__":
    main(["cross-validate", *sys.argv[1:]])
