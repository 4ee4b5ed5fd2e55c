"""`python -m fastmask` is the command line."""

import sys

from fastmask.cli import main

if __name__ == "__main__":
    # A run records how it was started, in words that start it again.
    sys.argv[0] = "fastmask"
    main()
