"""From flags to videos: what each shows, how long, where it goes, and the seed of its noise.

Files are read and targets looked at before torch is loaded; times and lengths follow once the family is known.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from flexkern.cli.argv import as_text
from flexkern.cli.errors import note
from flexkern.cli.flags import SEEDS, Flags
from flexkern.policies import Preset
from flexkern.render.assembly import Shown
from flexkern.render.choices import PROMPT, is_family
from flexkern.render.research import Research
from flexkern.render.target import validate_targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """What flags say of one video."""

    shown: Shown
    target: Path
    seed: int


def chosen_videos(flags: Flags, preset: Preset, research: Research | None, inline: Shown | None = None) -> list[Video]:
    """The videos of these flags. Raises where a file cannot be read or written, or a cut cannot be followed.

    inline: the prompts of a job, which then take the place of those that flags name.
    """
    from flexkern.render import validate_latents_target, validate_output

    if flags.output_folder is not None:
        validate_folder(flags.output_folder)
    shown, named = chosen_shown(flags, preset, research, inline), chosen_target(flags)
    samples = flags.num_samples or 1
    first = flags.seed or 0
    last = first + len(shown) * samples - 1
    if last >= SEEDS:
        raise ValueError(f"seed {first} is too large for {len(shown) * samples} videos: the last has {last}, over 2^64")
    videos = []
    for i, one in enumerate(shown):
        target = named if flags.data_path is None else named / f"{i:04}.mp4"
        for j in range(samples):
            path = target if samples == 1 else target.with_stem(f"{target.stem}-{j}")
            videos.append(Video(shown=one, target=path, seed=first + i * samples + j))
    folder = flags.output_folder
    if folder is None or folder.exists():
        for video in videos:
            if flags.latents is None:
                validate_output(video.target, flags.encoding())
            else:
                validate_latents_target(video.target)
    validate_targets([video.target for video in videos], flags.inputs())
    return videos


def chosen_shown(flags: Flags, preset: Preset, research: Research | None, inline: Shown | None = None) -> list[Shown]:
    """What each video shows, but for the samples."""
    from flexkern.render import PromptSwitch, read_script, validate_cuts

    if inline is not None:
        validate_cuts(preset, inline.script)
        return [inline]
    if flags.data_path is not None:
        return list_shown(flags, research)
    if research is not None and research.switches is not None:
        note(f"{research.path}: switch_frame_indices is not used: it is for several prompts in a line of --data-path")
    if flags.prompts is not None:
        script = read_script(flags.prompts)
        validate_cuts(preset, script)
        return [Shown(source=str(flags.prompts), script=script)]
    if flags.prompt is None and is_family(flags.model):
        raise ValueError(f"--model {flags.model} needs --prompt TEXT, --prompts FILE or --data-path FILE")
    prompt = PROMPT if flags.prompt is None else as_text(flags.prompt)
    return [Shown(source="--prompt", script=(PromptSwitch(at=0, prompt=prompt),))]


def list_shown(flags: Flags, research: Research | None) -> list[Shown]:
    """What the videos of --data-path show."""
    from flexkern.render import read_prompts

    assert flags.data_path is not None
    path, listed = flags.data_path, read_prompts(flags.data_path)
    if flags.extended_prompt_path is not None:
        path, extended = flags.extended_prompt_path, read_prompts(flags.extended_prompt_path)
        if len(extended.videos) != len(listed.videos):
            told = f"{path} holds {len(extended.videos)} prompts, {flags.data_path} {len(listed.videos)}"
            raise ValueError(f"--extended-prompt-path must hold a prompt for each of --data-path: {told}")
        listed = extended
    if listed.unused:
        note(f"{path}: not used: {', '.join(listed.unused)}")
    videos = listed.videos
    if research is not None and research.most is not None and research.most < len(videos):
        note(f"{research.path}: inference_iter {research.most}: the first {research.most} of {len(videos)} prompts")
        videos = videos[: research.most]
    switches = None if research is None else research.switches
    for i, prompts in enumerate(videos):
        if switches is not None and len(prompts) != len(switches) + 1:
            told = f"{len(switches)} switch_frame_indices are for {len(switches) + 1} prompts"
            raise ValueError(f"{path}: {told}, video {i + 1} has {len(prompts)}")
    return [Shown(source=str(path), prompts=prompts) for prompts in videos]


def chosen_target(flags: Flags) -> Path:
    """The file to write, or the folder of --data-path. Raises ValueError where none is named for several videos."""
    folder, out = flags.output_folder, flags.out or Path("video.mp4")
    if flags.data_path is None:
        return flags.latents or (out if folder is None else folder / out.name)
    if folder is None:
        raise ValueError("--data-path makes several videos: give --output-folder as well")
    return folder


def validate_folder(folder: Path) -> None:
    """Raises ValueError or PermissionError where no file can be written to the folder, which may be made first."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        where = "is not a folder" if there == folder else f"cannot be made in {there.name}"
        raise ValueError(f"--output-folder {folder} {where}")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"no permission to write {there}")
