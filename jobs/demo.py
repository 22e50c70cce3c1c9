"""`agr-ray demo` as a script."""

import sys

from agr_ray.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
