"""`python -m ease`."""

import sys

from ease.cli.main import main

sys.exit(main())
