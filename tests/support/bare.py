"""Python as in a bare environment: nothing of PYTHON* or FLEXKERN* is handed down."""

import os
import subprocess
import sys


def run_python(*args, cwd, **environment) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FLEXKERN"))}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300)
