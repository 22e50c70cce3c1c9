"""`agr-ray prepare` as a script, for `ray job submit -- python jobs/prepare.py ...`: the same options."""

import sys

from agr_ray.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
