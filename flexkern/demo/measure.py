"""What a demo video gets right: each named shape's colour, outline and motion, and the ground, frame by frame.

    marks = measure(videos, scenes)          # videos [B, T, 3, SIZE, SIZE] in [-1, 1], one scene each
    summary(marks)["identity"]               # [B], one figure per video
    curves(marks, window=21)["speed"]        # [B, T], a sliding window over time

Every pixel is unmixed into ground, first colour and second colour, which is exact for antialiased edges and for one
shape in front of another; a pixel that no such blend explains belongs to something foreign. A shape's place is the
centroid of its colour, its outline is compared with the templates of all three shapes there. The second named shape
may be hidden by the first: it is compared where the first leaves it visible, and not judged where less than a third of
it is left.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexkern.demo import world

BLEND = 0.25  # RGB distance, of 0..1, within which a blend of the scene's colours explains a pixel
FAINT = 0.1  # share of a colour in a pixel that is taken for noise
SOLID = 0.7  # share of a colour from which a pixel has that colour
SEEN = 8  # solid pixels from which a shape counts as seen
OVERLAP = 0.7  # intersection over union with its template from which an outline is right
VISIBLE = 1 / 3  # of the second shape's area, below which the first hides it
HIDDEN = 8  # frames that the second may stay out of sight behind the first before it counts as lost
REACH = 10  # pixels around a shape's centre that are looked at
LOW, HIGH = world.RIM + world.RADIUS, world.SIZE - world.RIM - world.RADIUS  # where centres are reflected
STEPS = (2.0, 1.0, 0.5, 0.25)  # pixels, of the search for the centre of a shape that is partly hidden
BATCH = 504  # frames at a time: what fits the cache is faster


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """Figures per frame, NaN where there is nothing to judge; the last axis of [B, T, 2] is the named shapes."""

    colour: Tensor
    """[B, T, 2]: 1 where at least half of the shape's visible area has its colour"""
    shape: Tensor
    """[B, T, 2]: 1 where the outline fits the named template, by ``OVERLAP`` at least and better than the other two"""
    identity: Tensor
    """[B, T, 2]: 1 where colour and shape are right"""
    speed: Tensor
    """[B, T, 2]: pixels moved since the frame before, over the prompt's speed; away from walls, where seen unhidden"""
    course: Tensor
    """[B, T, 2]: 1 where the shape is where straight flight and reflection take it from the two frames before, at half
    to twice the prompt's speed"""
    bounce: Tensor
    """[B, T, 2]: ``course``, only in frames in which a wall reflects the shape"""
    ground: Tensor
    """[B, T]: RGB distance, of 0..1, between the picture's median colour and the prompt's ground"""
    surplus: Tensor
    """[B, T]: share of the picture that is neither ground nor a named shape: foreign colours, and duplicates"""
    touching: Tensor
    """[B, T]: 1 where the second shape is seen to touch the first"""
    centre: Tensor
    """[B, T, 2, 2]: (x, y) in pixels of the picture; of a shape that is partly hidden, of its visible part"""

    def between(self, start: int, stop: int) -> "Marks":
        """The marks of frames start to stop - 1."""
        return Marks(**{field.name: getattr(self, field.name)[:, start:stop] for field in fields(self)})


FIGURES = tuple(field.name for field in fields(Marks) if field.name != "centre")


@torch.no_grad()
def measure(videos: Tensor, scenes: list[world.Scene]) -> Marks:
    """Marks of every frame of videos.

    Args:
        videos: [B, T, 3, SIZE, SIZE] in [-1, 1].
        scenes: What each of them was asked to show.

    Raises:
        ValueError: videos have another shape.
    """
    expected = [len(scenes), 3, world.SIZE, world.SIZE]
    if videos.dim() != 5 or [videos.shape[0], *videos.shape[2:]] != expected or videos.shape[1] < 1:
        raise ValueError(f"videos must be [B, T, C, h, w] with B, C, h, w = {expected}, got {list(videos.shape)}")
    frames = videos.shape[1]
    owner = torch.arange(len(scenes)).repeat_interleave(frames)
    flat = videos.cpu().flatten(0, 1)
    batches = [_look(flat[i : i + BATCH], owner[i : i + BATCH], scenes) for i in range(0, len(flat), BATCH)]
    seen = {name: torch.cat([one[name] for one in batches]).unflatten(0, (-1, frames)) for name in batches[0]}

    touching = seen["touching"] & (seen["solid"] >= SEEN).all(-1)
    visible = seen["solid"] >= SEEN
    judged = torch.ones_like(visible)
    judged[..., 1] = torch.where(
        visible[..., 1], ~touching | (seen["left"][..., 1] >= VISIBLE), ~_behind(visible[..., 1], touching)
    )
    mark = lambda right, counts: torch.where(counts, right.float(), math.nan)
    colour = visible & (seen["solid"] >= 0.5 * seen["area"])
    shape = visible & seen["outline"]
    free = visible & torch.stack((torch.ones_like(touching), ~touching), dim=-1)
    speed = torch.tensor([world.SPEEDS[scene.speed] for scene in scenes])[:, None, None]
    return Marks(
        colour=mark(colour, judged), shape=mark(shape, judged), identity=mark(colour & shape, judged),
        ground=seen["ground"], surplus=seen["surplus"], touching=touching.float(),
        centre=torch.where(visible[..., None], seen["centre"], math.nan),
        **motion(seen["centre"], free, speed, low=LOW, high=HIGH),
    )  # fmt: skip


def summary(marks: Marks) -> dict[str, Tensor]:
    """One figure per video, [B]: the mean over frames and shapes; of speed the median, averaged over the two shapes."""
    mean = {name: getattr(marks, name).flatten(1).nanmean(1) for name in FIGURES}
    return mean | {"speed": marks.speed.nanmedian(1).values.nanmean(1)}


def curves(marks: Any, window: int) -> dict[str, Tensor]:
    """Figures over time, [B, T]: the mean (of speed the median) of ``window`` frames around each, fewer at the ends.

    Args:
        marks: Of this world or another: a dataclass of figures [B, T] or [B, T, shapes], and of the shapes' ``centre``.
        window: Frames.
    """
    result = {}
    for name in (field.name for field in fields(marks) if field.name != "centre"):
        values = getattr(marks, name)
        values = values if values.dim() == 3 else values[..., None]
        padding = (0, 0, (window - 1) // 2, window // 2)
        around = F.pad(values, padding, value=math.nan).unfold(1, window, 1).flatten(2)  # [B, T, shapes * window]
        result[name] = around.nanmedian(2).values if name == "speed" else around.nanmean(2)
    return result


def _look(frames: Tensor, owner: Tensor, scenes: list[world.Scene]) -> dict[str, Tensor]:
    """What single frames [N, 3, SIZE, SIZE] show of the scenes that own them."""
    pixels = (frames.float() + 1) / 2
    empty = (world.render(scenes, torch.full((len(scenes), 1, 2, 2), -99.0))[:, 0] + 1) / 2
    inside = slice(world.RIM, world.SIZE - world.RIM)
    ground = pixels[:, :, inside, inside].flatten(2).median(-1).values
    shift = ground - empty[owner, :, world.RIM, world.RIM]
    # a ground that has drifted a little is no fault of the shapes on it
    base = empty[owner] + shift.clamp(-0.15, 0.15)[..., None, None]
    colours = torch.tensor([[world.COLOURS[c] for c in scene.colours] for scene in scenes])[owner]
    cover, foreign = unmix(pixels, base, colours)
    centre = torch.stack([_centre(cover[:, which]) for which in (0, 1)], dim=1)

    solid = cover >= SOLID
    near = F.max_pool2d(solid[:, :1].float(), 5, stride=1, padding=2)[:, 0] > 0
    touching = (near & solid[:, 1]).sum((1, 2)) > 2
    whole = torch.ones_like(cover[:, 0])
    first = _outline(cover[:, 0], whole, centre[:, 0], torch.zeros_like(touching))
    second = _outline(cover[:, 1], 1 - cover[:, 0], centre[:, 1], touching)
    overlap, area, left = (torch.stack(pair, dim=1) for pair in zip(first, second, strict=True))  # [N, 2, shapes]
    named = torch.tensor([[world.SHAPES.index(s) for s in scene.shapes] for scene in scenes])[owner]
    pick = lambda values: values.gather(2, named[..., None])[..., 0]

    close = torch.stack([_crop(solid[:, which].float(), centre[:, which]).sum((1, 2)) for which in (0, 1)], dim=1)
    astray = solid.sum((2, 3)) - close
    return {
        "ground": shift.norm(dim=-1),
        "surplus": (foreign.sum((1, 2)) + astray.sum(1)) / world.SIZE**2,
        "touching": touching,
        "centre": centre,
        "solid": close,
        "area": pick(area),
        "left": pick(left),
        "outline": (overlap.argmax(-1) == named) & (pick(overlap) >= OVERLAP),
    }


def unmix(pixels: Tensor, base: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of two colours in every pixel by least squares, each >= 0 and together <= 1, and where none explain it.

    pixels, base: [N, 3, H, W] in 0..1, the base without shapes. colours: [N, 2, 3].
    Returns [N, 2, H, W] in 0..1, zero where it is below ``FAINT`` or explains nothing, and [N, H, W] bool.
    """
    rest = pixels - base
    one, two = (colours[:, which, :, None, None] - base for which in (0, 1))
    dot = lambda x, y: (x * y).sum(1)
    aa, bb, ab, ap, bp = dot(one, one), dot(two, two), dot(one, two), dot(one, rest), dot(two, rest)
    both = aa * bb - ab * ab
    a, b = (ap * bb - bp * ab) / both, (bp * aa - ap * ab) / both
    a, b = torch.where(b < 0, ap / aa, a).clamp_min(0), torch.where(a < 0, bp / bb, b).clamp_min(0)
    share = torch.stack((a, b), dim=1) / (a + b).clamp_min(1)[:, None]
    foreign = (rest - share[:, :1] * one - share[:, 1:] * two).square().sum(1) > BLEND**2
    return share * ((share > FAINT) & ~foreign[:, None]), foreign


def _crop(maps: Tensor, centre: Tensor) -> Tensor:
    """Pixels within ``REACH`` of centres [N, 2 (x, y)]: [N, H, W] -> [N, 2 REACH + 1, 2 REACH + 1], zero outside."""
    at = centre.floor().long()[:, :, None] + torch.arange(2 * REACH + 1)
    padded = F.pad(maps, (REACH,) * 4)
    return padded[torch.arange(len(maps))[:, None, None], at[:, 1, :, None], at[:, 0, None, :]]


def _grid(centre: Tensor) -> Tensor:
    """Positions (x, y) of the pixels that ``_crop`` takes: [N, 2 REACH + 1, 2 REACH + 1, 2]."""
    axis = torch.arange(-REACH, REACH + 1) + 0.5
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1) + centre.floor()[:, None, None]


def _centre(cover: Tensor) -> Tensor:
    """Centroid (x, y) [N, 2] of the densest part of a map [N, H, W]; the middle of the picture where it is empty."""
    peak = F.avg_pool2d(cover[:, None], 9, stride=1, padding=4).flatten(1).argmax(1)
    centre = torch.stack((peak % world.SIZE, peak // world.SIZE), dim=1) + 0.5
    for _ in range(2):
        near, grid = _crop(cover, centre), _grid(centre)
        mass = near.sum((1, 2))[:, None]
        centroid = (near[..., None] * grid).sum((1, 2)) / mass.clamp_min(1e-6)
        centre = torch.where(mass > 0, centroid, world.SIZE / 2)
    return centre


def _outline(cover: Tensor, weight: Tensor, centre: Tensor, search: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How well each of ``SHAPES`` fits a map of shares [N, H, W], seen through weight [N, H, W].

    The template stands at ``centre`` [N, 2]; where ``search`` [N], because part of the shape is hidden, at the place
    near it that fits best. Returns, [N, shapes] each: intersection over union, visible pixels, their share of all.
    """
    near, through, grid = _crop(cover, centre), _crop(weight, centre), _grid(centre)
    place = centre[:, None].repeat(1, len(world.SHAPES), 1)
    moves = torch.cartesian_prod(*[torch.tensor([0.0, -1.0, 1.0])] * 2)
    for step in STEPS if search.any() else ():
        for number, shape in enumerate(world.SHAPES):
            tried = place[search, number, None] + step * moves  # [n, 9, 2]
            template = world.coverage(shape, grid[search, None] - tried[:, :, None, None]) * through[search, None]
            best = _overlap(near[search, None], template).argmax(1)
            place[search, number] = tried[torch.arange(len(best)), best]
    result = []
    for number, shape in enumerate(world.SHAPES):
        whole = world.coverage(shape, grid - place[:, number, None, None])
        seen = whole * through
        result.append((_overlap(near, seen), seen.sum((1, 2)), seen.sum((1, 2)) / whole.sum((1, 2)).clamp_min(1e-6)))
    fit, area, left = (torch.stack(found, dim=1) for found in zip(*result, strict=True))
    return fit, area, left


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    both, either = torch.minimum(one, other).sum((-2, -1)), torch.maximum(one, other).sum((-2, -1))
    return both / either.clamp_min(1e-6)


def _behind(visible: Tensor, touching: Tensor) -> Tensor:
    """Where the second, out of sight, was last seen touching the first no more than ``HIDDEN`` frames ago: [B, T]."""
    since = torch.full(visible.shape[:1], float("inf"))
    excused = []
    for seen, touches in zip(visible.unbind(1), touching.unbind(1), strict=True):
        since = torch.where(touches, 0.0, torch.where(seen, float("inf"), since + 1))
        excused.append(~seen & (since <= HIDDEN))
    return torch.stack(excused, dim=1)


def motion(
    centre: Tensor, free: Tensor, speed: Tensor, *, low: float, high: float, slack: float = 0.25
) -> dict[str, Tensor]:
    """Speed, course and bounce, as in ``Marks``, of shapes reflected at ``low`` and ``high``.

    centre: [B, T, 2, 2], free: [B, T, 2], where they are known; speed: [B, 1, 1], the prompt's. A shape is on its
    course within ``slack`` pixels and a quarter of a step.
    """
    gap = torch.minimum(centre - low, high - centre)  # to the nearer wall
    step = centre[:, 1:] - centre[:, :-1]
    reflected = gap[:, 1:] + gap[:, :-1]  # a step that bounced has gone this far along the axis
    limit = (1.25 * speed + 0.25)[..., None]
    away = free[:, 1:] & free[:, :-1] & (reflected > limit).all(-1)
    ratio = torch.where(away, step.norm(dim=-1) / speed, math.nan)

    # two accounts of the step before: it flew straight, or bounced off the nearer wall and now flies away from it
    known, now = step[:, :-1], centre[:, 1:-1]
    inward = torch.where(now < (low + high) / 2, 1.0, -1.0)
    bounced = inward * reflected[:, :-1].clamp_min(0)
    accounts = torch.stack((known, bounced))
    miss = (world.reflect(now + accounts, low, high) - centre[:, 2:]).abs()
    miss[1] = torch.where(reflected[:, :-1] <= limit, miss[1], math.inf)
    which = miss.argmin(0, keepdim=True)
    velocity, miss = accounts.gather(0, which)[0], miss.gather(0, which)[0]
    pace = velocity.norm(dim=-1) / speed
    right = (miss <= slack + 0.25 * speed[..., None]).all(-1) & (pace >= 0.5) & (pace <= 2)
    counts = free[:, 2:] & free[:, 1:-1] & free[:, :-2]
    there = now + velocity
    wall = ((there < low) | (there > high)).any(-1)
    pad = lambda values, frames: F.pad(values, (0, 0, frames, 0), value=math.nan)[:, : centre.shape[1]]
    course = torch.where(counts, right.float(), math.nan)
    return {
        "speed": pad(ratio, 1),
        "course": pad(course, 2),
        "bounce": pad(torch.where(wall, course, math.nan), 2),
    }
