"""``python -m flexkern.cli``: the command ``flexkern``."""

import sys

from flexkern.cli import main

sys.exit(main())
