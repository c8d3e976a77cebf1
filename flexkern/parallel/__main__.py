"""``python -m flexkern.parallel``: a rank that ``start_ranks`` starts; it is led by the process that did."""

import os
import sys

from flexkern.parallel.launch import main

status = main(sys.argv[1:])
os._exit(status)  # there is nothing to write out, and taking torch apart takes seconds, for which rank 0 would wait
