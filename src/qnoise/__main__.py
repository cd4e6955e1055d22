"""`python -m qnoise`: see `cli.py`."""

import sys

from qnoise.cli import main

if __name__ == "__main__":
    sys.exit(main())
