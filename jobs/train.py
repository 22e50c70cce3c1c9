"""`agr-ray train` as a script, for `ray job submit -- python jobs/train.py ...`: the same options."""

import sys

from agr_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
