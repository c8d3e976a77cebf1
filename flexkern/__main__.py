"""``python -m flexkern``: the command ``flexkern``."""

import sys

from flexkern.cli import main

sys.exit(main())
