"""VBench-Long: videos laid out as it wants them, its run where it is installed, its figures beside published ones.

VBench-Long cuts every video into clips of two seconds, scores the clips, and reads a folder of videos whose names begin
with their prompts (https://github.com/Vchitect/VBench, vbench2_beta_long, mode long_custom_input). On videos of one's
own it scores the six dimensions below; they do not read the prompt.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flexkern.checks import json_text

DIMENSIONS = {  # as VBench names them: the head of their column
    "subject_consistency": "subject",
    "background_consistency": "background",
    "motion_smoothness": "smoothness",
    "dynamic_degree": "dynamic",
    "aesthetic_quality": "aesthetic",
    "imaging_quality": "imaging",
}
SUFFIXES = (".mp4",)  # others keep their suffix in the names of its clips
LETTERS = 100  # of a prompt in a file name: VBench adds to it, and a name has 255 bytes
LAID_OUT, PROMPTS, RESULTS = "videos", "prompts.json", "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A row of a paper, in percent."""

    method: str
    seconds: int
    figures: Mapping[str, float]
    source: str


def _rows(source: str, columns: Sequence[str], *rows: tuple[str, int, tuple[float, ...]]) -> list[Published]:
    return [
        Published(method=method, seconds=seconds, figures=dict(zip(columns, figures, strict=True)), source=source)
        for method, seconds, figures in rows
    ]


PUBLISHED = (
    *_rows(
        "LongLive-2.0, table 5",
        tuple(DIMENSIONS.values()),
        ("Self-Forcing", 60, (95.84, 95.27, 98.20, 51.72, 56.05, 62.22)),
        ("Rolling Forcing", 60, (94.09, 94.47, 98.65, 36.00, 63.50, 72.42)),
        ("LongLive", 60, (97.13, 95.89, 98.61, 44.56, 58.17, 67.56)),
        ("LongLive-2.0", 60, (97.48, 97.00, 98.86, 60.62, 53.68, 65.51)),
    ),
    *_rows(
        "Deep Forcing, table 1 (128 MovieGen prompts)",
        ("dynamic", "imaging", "aesthetic"),
        ("Rolling Forcing", 30, (30.71, 70.58, 60.24)),
        ("LongLive", 30, (45.55, 69.07, 61.51)),
        ("CausVid", 30, (47.21, 66.36, 59.77)),
        ("Self-Forcing", 30, (36.62, 68.58, 59.44)),
        ("Deep Forcing", 30, (57.56, 69.31, 60.68)),
        ("Rolling Forcing", 60, (31.35, 70.25, 59.75)),
        ("LongLive", 60, (43.49, 69.11, 61.29)),
        ("CausVid", 60, (46.44, 65.84, 59.42)),
        ("Self-Forcing", 60, (31.98, 66.33, 56.45)),
        ("Deep Forcing", 60, (57.19, 69.27, 59.86)),
    ),
)


def validate_dimensions(names: Sequence[str]) -> None:
    """Raise ValueError where VBench-Long does not score a dimension on videos of one's own."""
    if unknown := [name for name in names if name not in DIMENSIONS]:
        raise ValueError(f"VBench-Long scores {', '.join(DIMENSIONS)} on videos of one's own, got {', '.join(unknown)}")
    if not names:
        raise ValueError(f"expected at least one dimension of {', '.join(DIMENSIONS)}")


def lay_out(videos: Mapping[str | Path, str], folder: str | Path) -> list[Path]:
    """Put videos where VBench-Long finds them, linked, or copied where they cannot be linked.

    Args:
        videos: files, each with its prompt.
        folder: gets ``videos/<prompt>-<number>.mp4`` and prompts.json, which has every prompt whole.

    Raises:
        FileNotFoundError: a video is not there.
        ValueError: there is no video, or one is no .mp4.
        FileExistsError: videos have been laid out there; VBench would score the clips that it cut of those.
    """
    if not videos:
        raise ValueError("expected at least one video, got none")
    named = {Path(path): prompt for path, prompt in videos.items()}
    for path in named:
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"VBench-Long names the clips of {' or '.join(SUFFIXES)} files, got {path}")
        if not path.is_file():
            raise FileNotFoundError(f"there is no video {path}")
    target = Path(folder) / LAID_OUT
    if target.exists():
        raise FileExistsError(f"{target} is there, and VBench would take the clips in it for those of these videos")
    target.mkdir(parents=True)
    counts: dict[str, int] = {}
    laid, prompts = [], {}
    for path, prompt in named.items():
        stem = file_stem(prompt)
        number = counts[stem] = counts.get(stem, -1) + 1
        there = target / f"{stem}-{number}.mp4"
        try:
            os.link(path, there)
        except OSError:  # another disk, or one that has no links
            shutil.copyfile(path, there)
        laid.append(there)
        prompts[there.name] = prompt
    (Path(folder) / PROMPTS).write_text(json_text(prompts, indent=2) + "\n", encoding="utf-8")
    return laid


def file_stem(prompt: str) -> str:
    """A prompt as a file's name may begin: no separators of folders, nothing that VBench cuts names at, and short."""
    plain = re.sub(r"[^\w ,'()&-]+", " ", prompt.replace("split_clip", "split clip"))
    plain = re.sub(r"-+(?=Scene)|-+(?=\d+$)", " ", " ".join(plain.split()))
    while len(plain.encode()) > LETTERS:
        plain = plain[:-1]
    return plain.strip(" -") or "video"


def is_installed() -> bool:
    """Whether VBench-Long can be imported."""
    return find_spec("vbench") is not None and find_spec("vbench2_beta_long") is not None


def run(folder: str | Path, dimensions: Sequence[str] = tuple(DIMENSIONS), *, device: str = "cuda") -> Path:
    """Score what ``lay_out`` put into the folder, with the settings of VBench's own eval_long.py.

    VBench downloads the models it scores with, and holds a whole video in memory.

    Returns:
        The JSON file of VBench's results.

    Raises:
        ModuleNotFoundError: VBench-Long is not installed.
        FileNotFoundError: what pip installs of it lacks the configurations.
    """
    validate_dimensions(dimensions)
    if not is_installed():
        raise ModuleNotFoundError(
            "VBench-Long is not installed: clone https://github.com/Vchitect/VBench, install its requirements, and "
            "put the clone on PYTHONPATH"
        )
    long, short = import_module("vbench2_beta_long"), import_module("vbench")
    home, info = Path(long.__file__ or "").parent, Path(short.__file__ or "").parent / "VBench_full_info.json"
    for needed in (home / "configs" / "clip_length_mix.yaml", home / "configs" / "slow_fast_params.yaml", info):
        if not needed.is_file():
            raise FileNotFoundError(f"VBench-Long is installed without {needed}: put a clone of it on PYTHONPATH")
    import torch

    (Path(folder) / RESULTS).mkdir(exist_ok=True)
    bench = long.VBenchLong(torch.device(device), str(info), str(Path(folder) / RESULTS))
    bench.evaluate(
        videos_path=str(Path(folder) / LAID_OUT),
        name="vbench_long",
        dimension_list=list(dimensions),
        mode="long_custom_input",
        # what eval_long.py sets without its --dev_flag
        sb_clip2clip_feat_extractor="dino",
        bg_clip2clip_feat_extractor="clip",
        imaging_quality_preprocessing_mode="longer",
        clip_length_config="clip_length_mix.yaml",
        slow_fast_eval_config=str(home / "configs" / "slow_fast_params.yaml"),
        w_inclip=1.0,
        w_clip2clip=0.0,
        use_semantic_splitting=False,
        static_filter_flag=False,
        num_of_samples_per_prompt=5,
        dev_flag=False,
    )
    return Path(folder) / RESULTS / "vbench_long_eval_results.json"


def read_results(path: str | Path) -> dict[str, float]:
    """The figures of a results file of VBench in percent, by the heads of their columns.

    Raises:
        ValueError: it is no such file.
    """
    try:
        found: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        figures = {
            head: 100 * float(found[name][0] if isinstance(found[name], list) else found[name])
            for name, head in DIMENSIONS.items()
            if name in found
        }
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is no results file of VBench: {error}") from None
    if not figures:
        raise ValueError(f"{path} has none of {', '.join(DIMENSIONS)}")
    return figures


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: rows by name, then what was published, in percent."""
    heads = list(DIMENSIONS.values())
    lines = [f"| | seconds | {' | '.join(heads)} | from |", "|---|---|" + "---|" * (len(heads) + 1)]
    cells = lambda figures: " | ".join(f"{figures[head]:.2f}" if head in figures else "–" for head in heads)
    lines += [f"| **{name}** | | {cells(figures)} | this run |" for name, figures in rows.items()]
    lines += [f"| {one.method} | {one.seconds} | {cells(one.figures)} | {one.source} |" for one in PUBLISHED]
    return "\n".join(lines)
