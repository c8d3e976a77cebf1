"""What a film of a room gets right, frame by frame: does it remember, and does it still move?

    marks = measure(films, case)             # films [B, T, 3, SIZE, SIZE] in [-1, 1]
    summary(marks, slice(21, None))["ground"]   # [B], over all frames beyond the horizon

Memory is judged where the lights are on, against the room that was given in the first chunk. Motion is judged in every
frame: shapes are brighter than any ground, lit or dark, so that what is bright is tracked from where the shapes began.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from flexkern.demo import rooms
from flexkern.demo.film_rooms import Case
from flexkern.demo.measure import motion

BRIGHT = {True: 0.62, False: 0.3}  # brightest channel from which a pixel is a shape's, by the lights
SOFT = {True: (0.5, 0.75), False: (0.08, 0.5)}  # the same with a soft edge: from none of it to all of it
NEAR = 0.15  # RGB distance within which a pixel has a colour: 14 degrees of the circle of hues
REACH = 15.0  # pixels from where a shape is expected within which it is looked for
SEEN = 12  # bright pixels from which a shape counts as seen
SLACK = 0.5  # pixels that a centre may be off course, beside a quarter of a step
APART = 20.0  # pixels between the shapes from which they hide nothing of each other
ALONE = 0.75  # of the shapes' area, below which one of them is hidden or gone
FLOODED = 2.0  # of the shapes' area, above which what is bright is no longer two shapes
TOGETHER = 30  # frames after which it is gone
BATCH = 504  # frames at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """Figures per frame, NaN where there is nothing to judge; the last axis of [B, T, 2] is the named shapes."""

    ground: Tensor
    """[B, T]: RGB distance, of 0..1, to the first second's ground, the median over the pixels outside shapes; lit"""
    palette: Tensor
    """[B, T]: overlap of the areas that the shapes' four colours take with those that they took in the first second,
    intersection over union; lit"""
    area: Tensor
    """[B, T]: area of all shapes over that of the given ones when they are apart"""
    course: Tensor
    """[B, T, 2]: 1 where the shape is where straight flight and reflection take it from the two frames before, at half
    to twice the prompt's speed"""
    speed: Tensor
    """[B, T, 2]: pixels moved since the frame before, over the prompt's speed; away from walls"""
    centre: Tensor
    """[B, T, 2, 2 (x, y)]: in pixels; NaN where the shape is not seen"""


FIGURES = tuple(field.name for field in fields(Marks) if field.name != "centre")


@torch.no_grad()
def measure(films: Tensor, case: Case) -> Marks:
    """Marks of every frame.

    Args:
        films: [B, T, 3, SIZE, SIZE] in [-1, 1], T at most the case's frames.
        case: What they were asked to show.

    Raises:
        ValueError: films have another shape.
    """
    expected = [len(case.scenes), 3, rooms.SIZE, rooms.SIZE]
    right = films.dim() == 5 and [films.shape[0], *films.shape[2:]] == expected
    if not right or not 3 <= films.shape[1] <= len(case.lights):
        limits = f"3 <= T <= {len(case.lights)}"
        raise ValueError(
            f"films must be [B, T, C, h, w] with B, C, h, w = {expected}, {limits}, got {list(films.shape)}"
        )
    frames = films.shape[1]
    lights = case.lights[:frames]
    pixels = (films.float().cpu().clamp(-1, 1) + 1) / 2
    threshold = torch.where(lights, BRIGHT[True], BRIGHT[False])[:, None, None]
    brightest = pixels.amax(2)
    bright = brightest > threshold  # [B, T, H, W]
    # soft, so that a centre is known to a fraction of a pixel
    low, high = (torch.where(lights, *ends)[:, None, None] for ends in zip(SOFT[True], SOFT[False], strict=True))
    weight = ((brightest - low) / (high - low)).clamp(0, 1)
    asked, foreign, whole = _asked(case)
    ground, palette = (torch.full(bright.shape[:2], math.nan) for _ in range(2))
    shown = torch.nonzero(lights)[:, 0]
    for b in range(len(case.scenes)):
        one = case.rooms[b : b + 1]
        for at in shown.split(BATCH):
            ground[b, at] = _ground(pixels[b, at], bright[b, at], rooms.ground(one)[0])
            palette[b, at] = _palette(pixels[b, at], bright[b, at], one, asked[b], foreign[b])
    centre, seen = _track(weight, case)
    gap = (centre[:, :, 0] - centre[:, :, 1]).norm(dim=-1)
    apart = (gap > APART) & seen.all(-1)
    area = bright.sum((2, 3)) / torch.where(lights, whole[:, 1, None], whole[:, 0, None])
    # one behind the other for a moment is as it should be; nothing but one for long is not
    one_left = _since(area > ALONE) > TOGETHER
    hidden = ~seen & ~one_left[..., None] & (gap < APART)[..., None]
    speed = torch.tensor([rooms.SPEEDS[scene.speed] for scene in case.scenes])[:, None, None]
    free = apart[..., None].expand_as(seen)
    found = motion(centre, free, speed, low=rooms.MARGIN, high=rooms.SIZE - rooms.MARGIN, slack=SLACK)
    flooded = area > FLOODED
    lost = (~seen & ~hidden) | one_left[..., None] | flooded[..., None]
    return Marks(
        ground=ground, palette=palette, area=area,
        course=torch.where(lost, 0.0, found["course"]), speed=found["speed"],
        centre=torch.where(seen[..., None], centre, math.nan),
    )  # fmt: skip


def summary(marks: Marks, over: slice) -> dict[str, Tensor]:
    """One figure per film, [B], over a range of frames: the mean; of speed the median, averaged over both shapes."""
    mean = {name: getattr(marks, name)[:, over].flatten(1).nanmean(1) for name in FIGURES}
    return mean | {"speed": marks.speed[:, over].nanmedian(1).values.nanmean(1)}


def _asked(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Of shapes that stand apart: pixels [B, 4] of each colour (hue, core, hue, core), of no such colour [B] (soft
    edges), and of all that is bright [B, 2 (dark, lit)].
    """
    count = len(case.scenes)
    apart = torch.tensor([[16.0, 16.0], [48.0, 48.0]]).expand(count, 1, 2, 2)
    lights = torch.tensor([[False], [True]])
    shown = [(rooms.render(case.scenes, case.rooms, apart, on.expand(count, 1))[:, 0] + 1) / 2 for on in lights]
    bright = [p.amax(1) > BRIGHT[on] for on, p in zip((False, True), shown, strict=True)]
    found = [_count(shown[1][b : b + 1], bright[1][b : b + 1], case.rooms[b : b + 1]) for b in range(count)]
    colours, foreign = (torch.cat(parts) for parts in zip(*found, strict=True))
    return colours, foreign, torch.stack([b.sum((1, 2)) for b in bright], dim=1).float()


def _count(pixels: Tensor, bright: Tensor, one: rooms.Rooms) -> tuple[Tensor, Tensor]:
    """Bright pixels of each of a room's four colours [N, 4], and of none [N], in pixels [N, 3, H, W]."""
    tones = rooms.colour(torch.stack((one.hue[0], one.core[0]), dim=1)).flatten(0, 1)
    nearest, which = (pixels[:, None] - tones[None, :, :, None, None]).norm(dim=2).min(dim=1)
    right = (nearest < NEAR) & bright
    colours = torch.stack([(right & (which == i)).sum((1, 2)) for i in range(4)], dim=1)
    return colours.float(), (bright & ~right).sum((1, 2)).float()


def _ground(pixels: Tensor, bright: Tensor, truth: Tensor) -> Tensor:
    """Median distance [N] of pixels [N, 3, H, W] to the ground [3, H, W], outside what is bright and its rim; of all
    pixels where that leaves less than half of them.
    """
    shape = F.max_pool2d(bright[:, None].float(), 5, stride=1, padding=2)[:, 0] > 0
    shape &= (shape.float().mean((1, 2)) < 0.5)[:, None, None]
    distance = (pixels - truth).norm(dim=1).masked_fill(shape, math.nan)
    return distance.flatten(1).nanmedian(1).values


def _palette(pixels: Tensor, bright: Tensor, one: rooms.Rooms, asked: Tensor, foreign: Tensor) -> Tensor:
    """Overlap [N] of the areas of a room's colours in pixels [N, 3, H, W] with those asked for [4]; as many pixels as
    ``foreign`` may have none of them.
    """
    found, other = _count(pixels, bright, one)
    either = torch.maximum(found, asked).sum(1) + (other - foreign).clamp_min(0)
    return torch.minimum(found, asked).sum(1) / either


def _track(weight: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Centres [B, T, 2, 2 (x, y)] of weights [B, T, H, W], followed from where the shapes began; which are seen,
    bool [B, T, 2]; those that are not stay where they were.
    """
    axis = torch.arange(rooms.SIZE) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack((x, y), dim=-1)
    now, step = case.rooms.position.clone(), torch.zeros_like(case.rooms.position)
    centres, seen = [], []
    for mask in weight.unbind(1):
        guess = now + step
        for _ in range(3):
            distance = (grid - guess[:, :, None, None]).norm(dim=-1)  # [B, 2, H, W]
            mine = distance.argmin(1)
            near = torch.stack([mask * ((mine == i) & (distance[:, i] < REACH)) for i in (0, 1)], dim=1)
            mass = near.sum((2, 3))
            found = (near[..., None] * grid).sum((2, 3)) / mass.clamp_min(1)[..., None]
            guess = torch.where((mass >= SEEN)[..., None], found, guess)
        there = mass >= SEEN
        # one that is lost is looked for where something bright belongs to neither
        astray = mask * (distance.amin(1) >= REACH)
        left = astray.sum((1, 2))
        elsewhere = (astray[..., None] * grid).sum((1, 2)) / left.clamp_min(1)[:, None]
        jump = ~there & (left >= SEEN)[:, None]
        new = torch.where(jump[..., None], elsewhere[:, None], torch.where(there[..., None], found, now))
        step = torch.where((there & ~jump)[..., None], (new - now).clamp(-4, 4), torch.zeros_like(new))
        now = new
        centres.append(now)
        seen.append(there)
    return torch.stack(centres, dim=1), torch.stack(seen, dim=1)


def _since(true: Tensor) -> Tensor:
    """Frames since a mark [B, T] was last true; at the start as if it had been just before."""
    count, found = torch.zeros(len(true)), []
    for now in true.unbind(1):
        count = torch.where(now, 0.0, count + 1)
        found.append(count)
    return torch.stack(found, dim=1)
