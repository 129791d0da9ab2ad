"""`python -m kexue.cli` does what the console script `kexue` does."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
