"""From flags to videos: what each shows, how long, where it goes, and the seed of its noise.

Files are read and targets looked at before torch is loaded; times and lengths follow once the family is known.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flexkern.cli.errors import note
from flexkern.cli.flags import PROMPT, SEEDS, Flags
from flexkern.cli.policies import is_family
from flexkern.cli.research import Research
from flexkern.policies import Preset

if TYPE_CHECKING:
    from flexkern.model.families import Family
    from flexkern.render import Pace, PromptSwitch

SECONDS = 10.0  # of a video whose length is not given; of a prompt in a list of them
LAST = "its last prompt, at {:g} seconds, is shown as long as the one before it"
OTHER_LENGTH = "--seconds, --frames or --num-output-frames sets another length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What one video shows: prompts with times, or prompts that follow each other, whose times are still to be set."""

    source: str
    """where that is said, for messages"""
    script: "tuple[PromptSwitch, ...]" = ()
    prompts: tuple[str, ...] = ()


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
    prompt = PROMPT if flags.prompt is None else flags.prompt
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


def validate_targets(targets: Sequence[Path], inputs: Mapping[str, Path]) -> None:
    """Raises ValueError where two videos have one file, or a file that is read would be overwritten."""
    read = {path.resolve(): name for name, path in inputs.items()}
    seen = set()
    for target in targets:
        path = target.resolve()
        if path in seen:
            raise ValueError(f"two videos would be written to {target}")
        if path in read:
            raise ValueError(f"{target} would be overwritten: it is also {read[path]}")
        seen.add(path)


def validate_folder(folder: Path) -> None:
    """Raises ValueError or PermissionError where no file can be written to the folder, which may be made first."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        where = "is not a folder" if there == folder else f"cannot be made in {there.name}"
        raise ValueError(f"--output-folder {folder} {where}")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"no permission to write {there}")


def timed(
    shown: Shown, flags: Flags, family: "Family", research: Research | None
) -> "tuple[tuple[PromptSwitch, ...], int, str | None]":
    """The script of a video, its length in pictures, and a note on the length where it follows the prompts.

    Raises ValueError for a length that is not whole chunks, and for a prompt that would never be shown.
    """
    from flexkern.engine import frames_for
    from flexkern.render import Pace, seconds_needed, spread, validate_shown

    pace = Pace(chunk=family.chunk, first_chunk=family.first_chunk, per_frame=family.pictures_per_frame, fps=family.fps)
    pictures, told = given_pictures(flags, family), None
    switches = research.switches if research is not None and shown.prompts else None
    try:
        if shown.prompts:
            if pictures is None:
                pictures, told = pictures_for(shown.prompts, switches, pace)
            script = spread(shown.prompts, pictures, pace, switches)
        else:
            script = shown.script
            if pictures is None:
                needed = seconds_needed(script)
                pictures = frames_for(max(SECONDS, needed), family.fps)
                told = LAST.format(script[-1].at) if needed > SECONDS else None
        validate_shown(script, pictures, pace)
    except ValueError as error:
        raise ValueError(f"{shown.source}: {error}") from None
    length = f"{pictures / family.fps:g} seconds"
    return script, pictures, told and f"{shown.source}: {length}, so that {told}; {OTHER_LENGTH}"


def pictures_for(prompts: Sequence[str], switches: Sequence[int] | None, pace: "Pace") -> tuple[int, str | None]:
    """The length of a video of several prompts where none is given, and why."""
    if switches is None:
        told = f"each of {len(prompts)} prompts is shown for {SECONDS:g} seconds" if len(prompts) > 1 else None
        return round(SECONDS * pace.fps) * len(prompts), told
    frames = 2 * switches[-1] - (0, *switches)[-2]
    return 1 + (frames - 1) * pace.per_frame, LAST.format((1 + (switches[-1] - 1) * pace.per_frame) / pace.fps)


def given_pictures(flags: Flags, family: "Family") -> int | None:
    """Length of the video in pictures, None where no option says it."""
    from flexkern.engine import frames_for

    if flags.num_output_frames is not None:
        family.validate_frames(flags.num_output_frames)
        return family.pictures(flags.num_output_frames)
    return flags.frames or (None if flags.seconds is None else frames_for(flags.seconds, family.fps))
