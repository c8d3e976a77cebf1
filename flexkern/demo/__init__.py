"""The demo model: a small causal transformer trained on a synthetic world, for seeing horizon extension on any machine.

engine = load_engine()
session = engine.session("a red disc and a blue square on dark green, fast", preset="flex", frames=252)

torch is loaded by what needs it, so that its commands can say at once what they have to say.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from flexkern.model.intact import looks_like_weights, require_there, validate_form
from flexkern.model.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from flexkern.engine import Engine
    from flexkern.model.families import Family
    from flexkern.model.wan import WanConfig
    from flexkern.parallel import Ranks

WEIGHTS = Path(__file__).parent / "demo.safetensors"
FPS = 16
ZOOM = 8  # pixels of a video for one of the world's
SCHEDULE = Schedule(steps=(1000, 750, 500, 250), first_steps=(1000, 875, 750, 625, 500, 375, 250, 125), fresh=False)


class PixelDecoder:
    """The trivial codec instead of a VAE: latents are pictures already, and are only enlarged to a watchable size."""

    def __call__(self, latents: "Tensor") -> "Tensor":
        import torch
        import torch.nn.functional as F

        pictures = F.interpolate(latents.float().flatten(0, 1), scale_factor=ZOOM, mode="bicubic", antialias=False)
        uint8 = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return uint8.permute(0, 2, 3, 1).unflatten(0, latents.shape[:2])

    def state(self) -> "dict[str, Tensor]":
        """Empty: a picture does not depend on those before it."""
        return {}

    def restore(self, state: "dict[str, Tensor]") -> None:
        """Nothing to restore. Raises ValueError for the state of another decoder."""
        if state:
            raise ValueError(f"expected the empty state of a pixel decoder, got {', '.join(sorted(state))}")


def encode_pixels(pixels: "Tensor") -> "Tensor":
    """Pictures uint8 [B, F, height, width, 3] of any size as latents [B, F, 3, SIZE, SIZE] in [-1, 1]."""
    import torch.nn.functional as F

    from flexkern.demo import world

    pictures = pixels.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(pictures, size=(world.SIZE, world.SIZE), mode="area").unflatten(0, pixels.shape[:2])


def encode_prompts(prompts: list[str]) -> "Tensor":
    """The demo's text encoder: [B, TEXT_LEN, TEXT_DIM]. Raises ValueError for prompts outside its grammar."""
    import torch

    from flexkern.demo import world

    return torch.stack([world.embed(world.Scene.parse(prompt)) for prompt in prompts])


def load_engine(
    weights: str | Path = WEIGHTS, *, backend: str = "auto", device: str = "cpu", graphs: bool = True,
    ranks: "Ranks | None" = None,
) -> "Engine":  # fmt: skip
    """The demo model, ready to render, in float32.

    Args:
        weights: Those that come with flexkern, or a safetensors file of the same form.
        backend: Name of the attention backend, "auto" or a key of ``flexkern.backends.BACKENDS``.
        device: Where to put it.
        graphs: Whether passes are captured as CUDA graphs and replayed, where they can be.
        ranks: Compute its sessions together (``flexkern.parallel``).

    Raises:
        ValueError: The backend cannot run there.
    """
    import torch

    from flexkern.demo import world
    from flexkern.engine import Engine

    return Engine.from_pretrained(
        weights, dtype=torch.float32, device=device, backend=backend, graphs=graphs, ranks=ranks, schedule=SCHEDULE,
        text_encoder=encode_prompts, encoder=encode_pixels, decoder=PixelDecoder, size=(world.SIZE, world.SIZE),
    )  # fmt: skip


def family() -> "Family":
    """How the demo is run; its latents are pixels, and every frame is a picture."""
    from flexkern.demo import world
    from flexkern.model.families import Family

    return Family(
        name="demo",
        schedule=SCHEDULE,
        size=(world.SIZE, world.SIZE),
        stride=ZOOM,
        pictures_per_frame=1,
        fps=FPS,
        doc="A small causal transformer trained on a synthetic world.",
        source="flexkern.demo.train",
    )


def validate_weights(weights: str | Path) -> None:
    """Raises FileNotFoundError or ValueError where the file's header is not that of a model of the demo's form."""
    read_config(weights)


def read_config(weights: str | Path) -> "WanConfig":
    """The sizes that the file's header says. Raises FileNotFoundError or ValueError as ``validate_weights``."""
    from safetensors import SafetensorError, safe_open

    from flexkern.demo import world
    from flexkern.model.wan import WanConfig

    path = Path(weights)
    require_there(path, "weights")
    needed = {"in_dim": 3, "out_dim": 3, "text_len": world.TEXT_LEN, "text_dim": world.TEXT_DIM}
    form = f"pixels in, pixels out, its text encoder, all said in the metadata entry flexkern_config ({needed})"
    other = f"{path} is not of the demo's form: {form}"
    if not path.is_file() or not looks_like_weights(path) or validate_form(path) != "safetensors":
        raise ValueError(other)
    try:
        with safe_open(path, framework="numpy") as file:
            config = json.loads((file.metadata() or {}).get("flexkern_config", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    if any(config.get(name) != value for name, value in needed.items()):
        raise ValueError(other)
    return WanConfig(**config)
