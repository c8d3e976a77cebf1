"""``flexkern eval``: benchmarks of the field, on any videos."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flexkern.cli.errors import note, refusing
from flexkern.cli.metrics import option


@dataclass(kw_only=True)
class Eval:
    """Score videos with VBench-Long, where it is installed, and print its figures beside published ones.

    Without VBench the videos are laid out as it wants them, and --results prints the table of a run elsewhere.
    """

    suite: Annotated[Literal["vbench"], tyro.conf.Positional]
    """vbench: VBench-Long, six dimensions"""

    videos: Annotated[tuple[Path, ...], tyro.conf.Positional, option("VIDEO...")] = ()
    """.mp4 files; a prompt is read from the sidecar that flexkern render writes, else it is the file's name"""

    out: Annotated[Path, option("FOLDER")] = Path("vbench")
    """where the layout and the results go; default: vbench"""

    dimensions: Annotated[tuple[str, ...], option("NAME...")] = ()
    """of VBench; default: all six"""

    results: Annotated[tuple[Path, ...], option("FILE...")] = ()
    """results of VBench to show instead of videos to score"""

    device: Annotated[str, option("DEVICE")] = "cuda"
    """where VBench's models run; default: cuda"""

    def run(self) -> int:
        with refusing(ValueError, OSError):
            from flexkern.metrics import vbench

            if bool(self.videos) == bool(self.results):
                raise ValueError("give videos to score, or --results FILE to show, one of both")
            dimensions = self.dimensions or tuple(vbench.DIMENSIONS)
            vbench.validate_dimensions(dimensions)
            found = {path.stem: vbench.read_results(path) for path in self.results}
            if self.videos:
                laid = vbench.lay_out({path: prompt_of(path) for path in self.videos}, self.out)
                note(f"{self.out / vbench.LAID_OUT}: {len(laid)} videos as VBench-Long wants them")
                if not vbench.is_installed():
                    print(
                        "VBench-Long is not installed here. Where it is: eval_long.py --mode long_custom_input "
                        f"--videos_path {self.out / vbench.LAID_OUT} --dimension {' '.join(dimensions)}; then "
                        "flexkern eval vbench --results FILE"
                    )
                    return 0
                path = vbench.run(self.out, dimensions, device=self.device)
                found = {self.out.name: vbench.read_results(path)}
        print(vbench.table(found))
        print("\nComparable with a published row only on the same prompts and length, cut into the same clips.")
        return 0


def prompt_of(path: Path) -> str:
    """The first prompt that a video's sidecar names, else the name of the file."""
    from flexkern.render import read_sidecar

    sidecar = read_sidecar(path)
    return path.stem if sidecar is None else str(sidecar["order"]["script"][0]["prompt"])
