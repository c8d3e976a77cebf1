"""``flexkern sheet``: a contact sheet of any videos."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from flexkern.cli.errors import refusing
from flexkern.cli.metrics import label, option


@dataclass(kw_only=True)
class Sheet:
    """Draw a contact sheet: a row for each video, a column for each moment."""

    videos: Annotated[tuple[Path, ...], tyro.conf.Positional, option("VIDEO...")]
    """files that FFmpeg reads, one or more"""

    out: Annotated[Path, option("FILE")] = Path("sheet.png")
    """the picture; default: sheet.png"""

    names: Annotated[tuple[str, ...], option("NAME...")] = ()
    """one per video, beside its row; default: the files' names"""

    columns: Annotated[int, option("COUNT")] = 8
    """moments, spread evenly over the longest video; default: 8"""

    at: Annotated[tuple[float, ...], option("SECONDS...")] = ()
    """these moments instead"""

    tile: Annotated[int, option("PIXELS")] = 240
    """width of a picture; default: 240"""

    horizon: Annotated[float | None, option("SECONDS")] = None
    """training horizon; a line is drawn where it ends"""

    title: Annotated[str, option("TEXT")] = ""
    """above the sheet"""

    def run(self) -> int:
        with refusing(ValueError, OSError):
            named = label(self.videos, self.names)
            if self.out.suffix.lower() != ".png":
                raise ValueError(f"the sheet must be named .png, got {self.out.name!r}")
            if not self.out.absolute().parent.is_dir():
                raise FileNotFoundError(f"there is no folder {self.out.parent} to write {self.out.name} to")

            from flexkern.metrics import contact_sheet

            contact_sheet(
                self.out, named, columns=self.columns, at=self.at or None, tile=self.tile, title=self.title,
                horizon=self.horizon,
            )  # fmt: skip
        print(self.out)
        return 0
