"""A synthetic world whose physics one can check: two shapes that move, bounce and hide one another on a coloured
ground.

A prompt says everything that does not change; a clip is that prompt and a random start. Shapes keep colour, size and
speed, are reflected by the walls, and pass in front of one another, the first named in front.

    "a red disc and a blue square on dark green, fast"
"""

import itertools
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 36  # pixels of a picture, either way
RIM = 2  # pixels of the wall
TRAIN_FRAMES = 21  # the horizon: frames of a training clip
RADIUS = 5.0  # pixels from the centre of a shape to the wall when it bounces

COLOURS = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 0.85, 0.25),
    "blue": (0.25, 0.4, 1.0),
    "yellow": (1.0, 0.9, 0.15),
    "magenta": (0.95, 0.25, 0.9),
    "cyan": (0.15, 0.9, 0.95),
}
GROUNDS = {
    "black": (0.02, 0.02, 0.02),
    "grey": (0.25, 0.25, 0.25),
    "dark red": (0.3, 0.05, 0.07),
    "dark green": (0.04, 0.24, 0.1),
    "dark blue": (0.05, 0.09, 0.32),
}
SHAPES = ("disc", "square", "triangle")
SPEEDS = {"slow": 0.5, "steady": 1.1, "fast": 2.0}  # pixels per frame

PHRASES = ("first", "second", "ground", "speed")
WORDS = ("a", "and", "on", "dark", *COLOURS, *SHAPES, "black", "grey", *SPEEDS)
TEXT_LEN = 12
TEXT_DIM = 2 * len(WORDS) + len(PHRASES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a prompt says. ``str(scene)`` is the prompt, ``Scene.parse`` its inverse."""

    colours: tuple[str, str]
    shapes: tuple[str, str]
    ground: str
    speed: str

    def __str__(self) -> str:
        first, second = (f"a {colour} {shape}" for colour, shape in zip(self.colours, self.shapes, strict=True))
        return f"{first} and {second} on {self.ground}, {self.speed}"

    @classmethod
    def parse(cls, prompt: str) -> "Scene":
        """The scene of a prompt. Raises ValueError naming the grammar where the prompt does not follow it."""
        either = lambda names: "(" + "|".join(names) + ")"
        thing = rf"an? {either(COLOURS)} {either(SHAPES)}"
        pattern = rf"{thing} and {thing} on {either(GROUNDS)}(?:,? {either(SPEEDS)})?"
        match = re.fullmatch(pattern, " ".join(prompt.lower().strip(" .").split()))
        if match is None or match[1] == match[3]:
            raise ValueError(
                'the demo model knows prompts like "a red disc and a blue square on dark green, fast", '
                f"with two different colours of {'/'.join(COLOURS)}, shapes {'/'.join(SHAPES)}, "
                f"grounds {'/'.join(GROUNDS)}, speeds {'/'.join(SPEEDS)}; got {prompt!r}"
            )
        one, disc, two, square, ground, speed = match.groups()
        return cls(colours=(one, two), shapes=(disc, square), ground=ground, speed=speed or "steady")


def all_scenes() -> list[Scene]:
    """Every scene that the grammar allows, with two different colours."""
    pairs = itertools.permutations(COLOURS, 2)
    choices = itertools.product(pairs, itertools.product(SHAPES, SHAPES), GROUNDS, SPEEDS)
    return [Scene(colours=c, shapes=s, ground=g, speed=v) for c, s, g, v in choices]


def held_out(scene: Scene) -> bool:
    """True for the eighth of all prompts that training never sees."""
    return zlib.crc32(str(scene).encode()) % 8 == 0


def embed(scene: Scene) -> Tensor:
    """The demo's text encoder: [TEXT_LEN, TEXT_DIM], zero after the last word."""
    first, second = (f"a {c} {s}".split() for c, s in zip(scene.colours, scene.shapes, strict=True))
    phrases = [first, ["and", *second], ["on", *scene.ground.split()], [scene.speed]]
    return embed_phrases(phrases, WORDS, TEXT_LEN, TEXT_DIM)


def embed_phrases(phrases: Sequence[Sequence[str]], known: Sequence[str], length: int, dim: int) -> Tensor:
    """A prompt's phrases, [length, dim], zero after the last word.

    Each word is one-hot among the known ones, beside it the words of its phrase and which phrase that is: what a
    contextual encoder would know, so that cross-attention can tell whose colour a colour is.
    """
    rows = torch.zeros(length, dim, device="cpu")
    at = 0
    for number, phrase in enumerate(phrases):
        words = [known.index(word) for word in phrase]
        for word in words:
            rows[at, word] = 1
            rows[at, [len(known) + w for w in words]] = 1
            rows[at, 2 * len(known) + number] = 1
            at += 1
    return rows


def reflect(position: Tensor, low: float, high: float) -> Tensor:
    """Fold positions on a line into [low, high], as a point bouncing between two walls moves."""
    width = high - low
    phase = (position - low).remainder(2 * width)
    return low + torch.minimum(phase, 2 * width - phase)


def coverage(shape: str, offset: Tensor) -> Tensor:
    """How much of a pixel the shape covers: offset [..., 2] (x, y) from its centre in pixels -> [...] in 0..1."""
    x, y = offset.unbind(-1)
    if shape == "disc":
        distance = offset.norm(dim=-1) - RADIUS
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - 0.88 * RADIUS
    else:  # an upright triangle; y grows downwards
        slant = math.cos(math.pi / 6) * x.abs() - math.sin(math.pi / 6) * y
        distance = torch.maximum(slant, y) - 0.6 * RADIUS
    return (0.5 - distance).clamp(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Motion:
    """Where the shapes start and where they are headed: position and velocity [B, 2 shapes, 2 (x, y)], in pixels."""

    position: Tensor
    velocity: Tensor

    @classmethod
    def random(cls, scenes: list[Scene], generator: torch.Generator | None = None) -> "Motion":
        """A random start with the shapes apart: whatever hides what later, a clip begins with both in view."""
        batch, tries, low = len(scenes), 16, RIM + RADIUS
        candidates = low + (SIZE - 2 * low) * torch.rand(batch, tries, 2, 2, generator=generator)
        apart = (candidates[:, :, 0] - candidates[:, :, 1]).norm(dim=-1).clamp(max=2 * RADIUS + 2)
        position = candidates[torch.arange(batch), apart.argmax(dim=1)]  # the first that is, or the widest of all
        angle = 2 * math.pi * torch.rand(batch, 2, generator=generator)
        speed = torch.tensor([SPEEDS[scene.speed] for scene in scenes])[:, None, None]
        return cls(position=position, velocity=speed * torch.stack((angle.cos(), angle.sin()), dim=-1))

    def at(self, frames: Tensor) -> Tensor:
        """Centres [B, T, 2 shapes, 2 (x, y)] at the frame numbers [T]."""
        straight = self.position[:, None] + self.velocity[:, None] * frames[:, None, None]
        return reflect(straight, RIM + RADIUS, SIZE - RIM - RADIUS)


def render(scenes: list[Scene], centres: Tensor) -> Tensor:
    """Pictures [B, T, 3, SIZE, SIZE] in [-1, 1] of shapes at centres [B, T, 2, 2]."""
    ground = torch.tensor([GROUNDS[scene.ground] for scene in scenes])[:, None, :, None, None]
    axis = torch.arange(SIZE)
    inside = (axis >= RIM) & (axis < SIZE - RIM)
    wall = (~(inside[:, None] & inside[None])).float()
    pictures = (ground + 0.25 * wall).expand(-1, centres.shape[1], -1, -1, -1)
    y, x = torch.meshgrid(axis + 0.5, axis + 0.5, indexing="ij")
    offset = torch.stack((x, y), dim=-1) - centres[:, :, :, None, None]  # [B, T, 2, SIZE, SIZE, 2]
    for which in (1, 0):  # the first named is in front
        drawn = {shape: coverage(shape, offset[:, :, which]) for shape in SHAPES}
        cover = torch.stack([drawn[scene.shapes[which]][b] for b, scene in enumerate(scenes)])[:, :, None]
        colour = torch.tensor([COLOURS[scene.colours[which]] for scene in scenes])[:, None, :, None, None]
        pictures = pictures + cover * (colour - pictures)
    return pictures * 2 - 1


def clips(scenes: list[Scene], frames: int = TRAIN_FRAMES, generator: torch.Generator | None = None) -> Tensor:
    """One clip for each scene, from a random start: [B, frames, 3, SIZE, SIZE] in [-1, 1]."""
    return render(scenes, Motion.random(scenes, generator).at(torch.arange(frames)))
