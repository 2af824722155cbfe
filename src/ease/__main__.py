"""`python -m ease`."""

import sys

from ease.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
