"""``python -m flexkern.parallel``: a rank that ``start_ranks`` starts; it is led by the process that did."""

import os
import sys
import traceback

from flexkern.parallel.follow import LOST
from flexkern.parallel.launch import main

try:
    status = main(sys.argv[1:])
except Exception:
    traceback.print_exc()
    status = LOST
sys.stderr.flush()
os._exit(status)  # at once: taking torch apart takes seconds, in which connections stay open and rank 0 waits
