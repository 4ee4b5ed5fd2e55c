"""`python -m fastmask` is the command line."""

from fastmask.cli import main

if __name__ == "__main__":
    main()
