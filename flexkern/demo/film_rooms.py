"""Films of rooms: the first chunk is given, the lights go off and on as a script says, the model makes the rest.

engine = load_engine()
case = Case.random(scenes=16, frames=252, seed=0)
latents = film(engine, case, "flex")                # [16, 252, 3, SIZE, SIZE] in [-1, 1]
truth = case.truth()                                # what they should be
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexkern.demo import SCHEDULE, rooms
from flexkern.engine import Engine
from flexkern.policies import Preset
from flexkern.session import Chunk

WEIGHTS = Path(__file__).parent / "rooms.safetensors"


def encode_prompts(prompts: list[str]) -> Tensor:
    """The text encoder: [B, TEXT_LEN, TEXT_DIM]. Raises ValueError for prompts outside the grammar of rooms."""
    return torch.stack([rooms.embed(rooms.Scene.parse(prompt)) for prompt in prompts])


def load_engine(weights: str | Path = WEIGHTS, *, backend: str = "sdpa", device: str = "cpu") -> Engine:
    """A model of rooms, ready to render, in float32; without a decoder, because its latents are pictures already.

    Args:
        weights: Those that come with flexkern, or what ``flexkern.demo.train_rooms`` wrote.
        backend: Name of the attention backend, a key of ``flexkern.backends.BACKENDS``.
        device: Where to put it.

    Raises:
        ValueError: The backend cannot run there.
    """
    return Engine.from_pretrained(
        weights, dtype=torch.float32, device=device, backend=backend, schedule=SCHEDULE,
        text_encoder=encode_prompts, size=(rooms.SIZE, rooms.SIZE),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a batch of films is asked to show."""

    scenes: list[rooms.Scene]
    rooms: rooms.Rooms
    """one for each scene"""
    lights: Tensor
    """bool [frames], for all of them"""
    seed: int
    """of the noise of the first; film b has seed + b"""

    @classmethod
    def random(cls, *, scenes: int, frames: int, seed: int = 0, lights: Tensor | None = None) -> "Case":
        """So many prompts, as different as there are, each with a room of its own; lights by ``rooms.script``."""
        draw = random.Random(seed)
        names: list[rooms.Scene] = []
        while len(names) < scenes:
            names += draw.sample(rooms.all_scenes(), len(rooms.all_scenes()))
        made = rooms.Rooms.random(scenes, torch.Generator().manual_seed(seed))
        script = rooms.script(frames) if lights is None else lights
        return cls(scenes=names[:scenes], rooms=made, lights=script, seed=seed)

    def __getitem__(self, chosen: slice) -> "Case":
        first = chosen.indices(len(self.scenes))[0]
        return Case(
            scenes=self.scenes[chosen], rooms=self.rooms[chosen], lights=self.lights, seed=self.seed + first
        )  # fmt: skip

    def truth(self, frames: int | None = None) -> Tensor:
        """What the films should show, [B, frames, 3, SIZE, SIZE] in [-1, 1]; all frames by default."""
        lights = self.lights[:frames]
        return rooms.clip(self.scenes, self.rooms, lights.expand(len(self.scenes), -1))


def film_chunks(engine: Engine, case: Case, preset: str | Preset) -> Iterator[Chunk]:
    """The chunks of one film per scene, the given one first; the last may go beyond the case's frames."""
    frames, after = len(case.lights), dict(rooms.switches(case.lights))
    prompts = lambda on: [str(scene.lit(on)) for scene in case.scenes]
    session = engine.session(prompts(after.pop(0)), preset=preset, frames=frames, seed=case.seed)
    yield session.prefill(case.truth(rooms.CHUNK).to(engine.model.device))
    while session.next_frame < frames:
        if session.next_frame in after:
            session.switch(prompts(after[session.next_frame]))
        yield session.step()
    session.validate_chunks()


def film(engine: Engine, case: Case, preset: str | Preset, *, batch: int = 16) -> Tensor:
    """Latents [B, frames, 3, SIZE, SIZE] of one film per scene, ``batch`` of them at a time."""
    made = []
    for i in range(0, len(case.scenes), batch):
        chunks = film_chunks(engine, case[i : i + batch], preset)
        made.append(torch.cat([chunk.latents.cpu() for chunk in chunks], dim=1)[:, : len(case.lights)])
    return torch.cat(made)
