"""`agr-ray render` as a script, for `ray job submit -- python jobs/render.py ...`: the same options."""

import sys

from agr_ray.cli import main

if __name__ == "__main__":
    main(["render", *sys.argv[1:]])
