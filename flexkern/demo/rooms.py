"""A synthetic world that needs memory by construction: a room whose lights go out for longer than the window.

A prompt names kinds only, and whether the lights are on. What a room looks like, the hues and stripes of its ground,
the hues, sizes and cores of its two shapes, is continuous, drawn for each clip, and lives in the context alone.
In the dark all of it is out of sight: the ground is black, and each shape a pale silhouette of its kind, of one size
for all, that flies on and bounces. When a later prompt puts the lights on again, the room must be the one of the first
second. A window that holds nothing but dark frames by then cannot know which one that was.

    "a disc and a square, fast, lights on"
"""

import itertools
import math
import re
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from flexkern.demo.world import embed_phrases, reflect

SIZE = 64  # pixels of a picture, either way
TRAIN_FRAMES = 21  # the horizon: frames of a training clip
CHUNK = 3  # frames that are denoised together, and between which lights are switched
MARGIN = 11.0  # pixels from the centre of a shape to the edge of the picture when it bounces, whatever its size
DARK_RADIUS = 6.0  # pixels, of every silhouette
RADII = 7.5, 10.5  # pixels: the range of sizes
CORES = 0.35, 0.6  # the range of a core's radius, as a share of its shape's
WAVES = 16.0, 40.0  # pixels: the range of the distance between two stripes of the ground
GROUND = 0.42  # brightness of the ground, at most; a shape's brightest channel is 0.75 at least
DARK_GROUND, DARK_SHAPE = (0.02, 0.02, 0.05), (0.55, 0.55, 0.62)

SHAPES = ("disc", "square", "triangle")
SPEEDS = {"slow": 1.2, "fast": 2.4}  # pixels per frame
LIGHTS = ("off", "on")
PHRASES = ("first", "second", "speed", "lights")
WORDS = ("a", "and", "lights", *SHAPES, *SPEEDS, *LIGHTS)
TEXT_LEN = 8
TEXT_DIM = 2 * len(WORDS) + len(PHRASES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a prompt says. ``str(scene)`` is the prompt, ``Scene.parse`` its inverse."""

    shapes: tuple[str, str]
    speed: str
    lights: bool = True

    def __str__(self) -> str:
        first, second = self.shapes
        return f"a {first} and a {second}, {self.speed}, lights {LIGHTS[self.lights]}"

    @classmethod
    def parse(cls, prompt: str) -> "Scene":
        """The scene of a prompt. Raises ValueError naming the grammar where the prompt does not follow it."""
        either = lambda names: "(" + "|".join(names) + ")"
        pattern = rf"a {either(SHAPES)} and a {either(SHAPES)}, {either(SPEEDS)}(?:, lights {either(LIGHTS)})?"
        match = re.fullmatch(pattern, " ".join(prompt.lower().strip(" .").split()))
        if match is None or match[1] == match[2]:
            raise ValueError(
                'this model knows prompts like "a disc and a square, fast, lights on", with two different shapes of '
                f"{'/'.join(SHAPES)}, speeds {'/'.join(SPEEDS)}, lights {'/'.join(LIGHTS)}; got {prompt!r}"
            )
        return cls(shapes=(match[1], match[2]), speed=match[3], lights=match[4] != "off")

    def lit(self, on: bool) -> "Scene":
        """The same with lights on or off."""
        return replace(self, lights=on)


def all_scenes() -> list[Scene]:
    """Every scene that the grammar allows, lights on."""
    choices = itertools.product(itertools.permutations(SHAPES, 2), SPEEDS)
    return [Scene(shapes=shapes, speed=speed) for shapes, speed in choices]


def embed(scene: Scene) -> Tensor:
    """The text encoder: [TEXT_LEN, TEXT_DIM]."""
    first, second = scene.shapes
    phrases = [["a", first], ["and", "a", second], [scene.speed], ["lights", LIGHTS[scene.lights]]]
    return embed_phrases(phrases, WORDS, TEXT_LEN, TEXT_DIM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """What no prompt says, of B clips. Hues are in turns, lengths in pixels; the axis of 2 is the named shapes."""

    ground: Tensor
    """[B, 2]: hues of the ground's bright and dark stripes"""
    wave: Tensor
    """[B, 2 (x, y)]: stripes in a pixel, across them"""
    phase: Tensor
    """[B]: of the stripes, in turns"""
    hue: Tensor
    """[B, 2]: of the shapes"""
    core: Tensor
    """[B, 2]: hues of their cores"""
    radius: Tensor
    """[B, 2]: of the shapes"""
    share: Tensor
    """[B, 2]: of a core's radius in its shape's"""
    position: Tensor
    """[B, 2, 2 (x, y)]: where the shapes' centres are at frame 0"""
    heading: Tensor
    """[B, 2]: which way they move, in turns"""

    @classmethod
    def random(cls, count: int, generator: torch.Generator | None = None) -> "Rooms":
        """Rooms drawn uniformly; shapes start apart."""
        draw = lambda *shape: torch.rand(*shape, generator=generator)
        between = lambda low, high, *shape: low + (high - low) * draw(*shape)
        angle = 2 * math.pi * draw(count)
        wave = torch.stack((angle.cos(), angle.sin()), dim=-1) / between(*WAVES, count)[:, None]
        candidates = between(MARGIN, SIZE - MARGIN, count, 16, 2, 2)
        apart = (candidates[:, :, 0] - candidates[:, :, 1]).norm(dim=-1).clamp(max=2 * MARGIN + 2)
        hue = draw(count, 2)
        return cls(
            ground=draw(count, 2), wave=wave, phase=draw(count), hue=hue,
            core=hue + between(0.25, 0.75, count, 2),  # told apart from the shape around it
            radius=between(*RADII, count, 2), share=between(*CORES, count, 2),
            position=candidates[torch.arange(count), apart.argmax(dim=1)], heading=draw(count, 2),
        )  # fmt: skip

    def __getitem__(self, chosen: slice) -> "Rooms":
        return Rooms(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def centres(self, scenes: list[Scene], frames: Tensor) -> Tensor:
        """Where shapes that move as the prompt says are at the frame numbers [T]: [B, T, 2, 2 (x, y)]."""
        speed = torch.tensor([SPEEDS[scene.speed] for scene in scenes])[:, None, None]
        angle = 2 * math.pi * self.heading
        velocity = speed * torch.stack((angle.cos(), angle.sin()), dim=-1)
        straight = self.position[:, None] + velocity[:, None] * frames[:, None, None]
        return reflect(straight, MARGIN, SIZE - MARGIN)


def colour(hue: Tensor) -> Tensor:
    """RGB [..., 3] in 0..1 of hues in turns [...]: a circle around mid grey, so that no hue is like another."""
    return 0.5 + 0.5 * (2 * math.pi * (hue[..., None] - torch.tensor([0.0, 1 / 3, 2 / 3]))).cos()


def gauge(kind: str, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """How large a shape of that kind must be to reach offsets x, y (downwards) from its centre, in pixels, and how many
    pixels its outline moves outwards where its radius grows by one.
    """
    if kind == "disc":
        return torch.hypot(x, y), 1.0
    if kind == "square":
        return torch.maximum(x.abs(), y.abs()) / 0.88, 0.88
    # an upright triangle
    return torch.maximum(math.cos(math.pi / 6) * x.abs() - math.sin(math.pi / 6) * y, y) / 0.62, 0.62


def ground(rooms: Rooms) -> Tensor:
    """The lit ground without shapes: [B, 3, SIZE, SIZE] in 0..1."""
    axis = torch.arange(SIZE) + 0.5
    turn = (
        rooms.wave[:, 0, None, None] * axis + rooms.wave[:, 1, None, None] * axis[:, None] + rooms.phase[:, None, None]
    )
    bright = (0.5 + 0.5 * (2 * math.pi * turn).cos())[:, None]
    first, second = (colour(rooms.ground[:, i])[:, :, None, None] for i in (0, 1))
    return GROUND * (bright * first + 0.45 * (1 - bright) * second)


def render(scenes: list[Scene], rooms: Rooms, centres: Tensor, lights: Tensor) -> Tensor:
    """Pictures [B, T, 3, SIZE, SIZE] in [-1, 1] of shapes at centres [B, T, 2, 2]; lights: [B, T], true where on."""
    on = lights[:, :, None, None, None]
    lit, dark = ground(rooms)[:, None], torch.tensor(DARK_GROUND)[:, None, None]
    pictures = torch.where(on, lit, dark)
    axis = torch.arange(SIZE) + 0.5
    pale = torch.tensor(DARK_SHAPE)
    for which in (1, 0):  # the first named is in front
        offset = axis - centres[:, :, which, :, None]  # [B, T, (x, y), SIZE]
        x, y = offset[:, :, 0, None, :], offset[:, :, 1, :, None]
        found = [gauge(scene.shapes[which], x[b], y[b]) for b, scene in enumerate(scenes)]
        size = torch.stack([g.expand(-1, SIZE, SIZE) for g, _ in found])[:, :, None]
        slope = torch.tensor([k for _, k in found])[:, None, None, None, None]
        radius = torch.where(lights, rooms.radius[:, which, None], DARK_RADIUS)[:, :, None, None, None]
        inner = rooms.share[:, which, None, None, None, None] * radius
        cover, core = ((0.5 + 0.5 * slope * (r - size)).clamp(0, 1) for r in (radius, inner))  # edges are 2 px wide
        outside, inside = (colour(hues[:, which])[:, None, :, None, None] for hues in (rooms.hue, rooms.core))
        tone = torch.where(on, outside + core * (inside - outside), pale[:, None, None])
        pictures = torch.lerp(pictures, tone, cover)
    return pictures * 2 - 1


def clip(scenes: list[Scene], rooms: Rooms, lights: Tensor) -> Tensor:
    """The truth: [B, T, 3, SIZE, SIZE] in [-1, 1] of lights [B, T]."""
    return render(scenes, rooms, rooms.centres(scenes, torch.arange(lights.shape[1])), lights)


def script(frames: int, *, first: int = TRAIN_FRAMES, dark: int = 24, lit: int = 12) -> Tensor:
    """Whether the lights are on, bool [frames]: for the horizon, then by turns off for longer than the window and on.

    Raises:
        ValueError: A length is not whole chunks.
    """
    if any(length % CHUNK or length < CHUNK for length in (first, dark, lit)):
        raise ValueError(f"expected lengths in whole chunks of {CHUNK} frames, got {first}, {dark} and {lit}")
    return (torch.arange(frames) < first) | ((torch.arange(frames) - first) % (dark + lit) >= dark)


def switches(lights: Tensor) -> list[tuple[int, bool]]:
    """The frames at which lights [T] change, and to what; frame 0 first."""
    state = lights.tolist()
    return [(frame, on) for frame, on in enumerate(state) if frame == 0 or on != state[frame - 1]]
