"""Stands in for an installation: with bench/importable on the path, a bare archive of the repository can be imported.

Installed, the folder kernels/ is ``flexkern.kernels``; in the source tree it lies elsewhere, and only this knows where.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
__path__ = [str(_ROOT / "flexkern"), str(_ROOT)]
__file__ = str(_ROOT / "flexkern" / "__init__.py")
exec(compile(Path(__file__).read_text(), __file__, "exec"))
