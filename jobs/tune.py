"""`agr-ray tune` as a script, for `ray job submit -- python jobs/tune.py ...`: the same options."""

import sys

from agr_ray.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
