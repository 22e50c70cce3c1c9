"""`agr-ray report` as a script, for `ray job submit -- python jobs/report.py ...`: the same options."""

import sys

from agr_ray.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
