"""Our decoder, one video at a time, in bounded memory.

    decoder = WanDecoder.from_pretrained("Wan2.1-T2V-1.3B", device="cuda", dtype=torch.bfloat16)
    pictures = decoder(latents)  # those of the next latent frames, uint8 [B, pictures, height, width, 3]
    decoder.reset()  # before another video

How many pictures are computed together, and in how many tiles, follows from the memory that it may take, and changes
nothing about them.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from flexkern.checks import require, shown, whole
from flexkern.finite import all_finite
from flexkern.model.decoder import ChunkDecoder
from flexkern.model.files import some_of
from flexkern.model.vae.graphs import ChunkGraphs, InPlace, find_recorder
from flexkern.model.vae.memory import Cut, count_elements, frames_at_once, is_countable, reach, spans
from flexkern.model.vae.net import Convolutions, DecoderNet, Past
from flexkern.model.vae.ops import to_bytes
from flexkern.model.vae.weights import held_by, load_net, read_vae

ON_CPU = 4 * 2**30  # bytes that a decoder takes on a CPU if it can; on a GPU it is a quarter of the GPU's memory
MOST_TILES = 16  # to a side
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16


def _validate(dtype: object, memory: int | None) -> None:
    """Raises ValueError for what is no dtype to compute in, or no number of bytes."""
    names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
    require(dtype in DTYPES, f"dtype must be one of torch's {names}, got {shown(dtype)}")
    if memory is not None:
        whole("memory", memory, 1)


class WanDecoder(ChunkDecoder):
    """Decodes latents of Wan 2.1 with a network of our own; its pictures are those of diffusers' decoder.

    Args:
        net: With its weights; may be shared by many decoders.
        memory: The most bytes that weights, past and what is being computed may take, for latents of any size;
            convolutions may want workspace beside it. Default: a quarter of the GPU's memory, 4 GiB on a CPU, or what
            one picture at a time takes where that is more.
        graphs: Whether a chunk that is shaped as the one before it is captured as a CUDA graph, and replayed from then
            on. The pictures are the same, bit for bit.

    Raises:
        ValueError: ``graphs``, and nothing can be captured where the network is.

    Attributes:
        graphs: What replays chunks: how many graphs it holds, how many bytes, why a chunk was launched. None without.
    """

    def __init__(self, net: DecoderNet, *, memory: int | None = None, graphs: bool = False):
        sizes = net.sizes
        super().__init__(
            channels=sizes.latent, spatial=2 ** (len(sizes.widths) - 1), temporal=sizes.stretch[0], dtype=net.dtype,
            device=net.device,
        )  # fmt: skip
        require(isinstance(graphs, bool), f"graphs must be True or False, got {shown(graphs)}")
        self.net, self.memory = net, None if memory is None else whole("memory", memory, 1)
        self.graphs = ChunkGraphs(net, find_recorder(net)) if graphs else None
        self._kept = Past()
        self._weights = sum(t.numel() * t.element_size() for t in chain(net.parameters(), net.buffers()))

    def __repr__(self) -> str:
        past, dtype = self._past(), str(self.dtype).removeprefix("torch.")
        video = "before a video" if past is None else "in {} video(s), latents of {}x{}".format(*past)
        return f"WanDecoder({dtype} on {self.device}, within {self._allowed() / 1e9:.3g} GB; {video})"

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        memory: int | None = None, graphs: bool = False, convolutions: Convolutions = "library",
    ) -> "WanDecoder":  # fmt: skip
        """The decoder of a checkpoint; needs torch and safetensors alone.

        Args:
            path: Wan2.1_VAE.pth, another file with its keys or diffusers', or the folder of either.
            device: Where to decode.
            dtype: Of what is computed.
            memory: As above.
            graphs: As above.
            convolutions: Who computes those of 3x3x3: "library" is torch's, which is cuDNN on a GPU; "hopper" a kernel
                of our own for compute capability 9.0, in bfloat16 or float16, which no GPU has run yet.

        Raises:
            FileNotFoundError: No weights are there.
            NotImplementedError: The VAE of Wan 2.2.
            ValueError: dtype or memory is none; lists the keys that do not fit; the convolutions cannot be computed so;
                or as above.
        """
        _validate(dtype, memory)
        net = load_net(read_vae(path), dtype=dtype, device=device, convolutions=convolutions)
        return cls(net, memory=memory, graphs=graphs)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        normalised: bool = True,
        dtype: torch.dtype | None = None,
        memory: int | None = None,
        graphs: bool = False,
        convolutions: Convolutions = "library",
    ) -> "WanDecoder":
        """The decoder with the weights of a VAE that is in memory, on its device.

        Args:
            module: diffusers' AutoencoderKLWan, or Wan's own VAE.
            normalised: Whether latents come as a transformer makes them; False for those that AutoencoderKLWan takes.
            dtype: Of what is computed. Default: the module's.
            memory: As above.
            graphs: As above.
            convolutions: As in ``from_pretrained``.

        Raises:
            NotImplementedError: The VAE of Wan 2.2.
            TypeError: It is no module.
            ValueError: It is another module; dtype or memory is none; the convolutions cannot be computed so; or as
                above.
        """
        _validate(torch.float32 if dtype is None else dtype, memory)
        if not isinstance(module, nn.Module):
            hint = "; pass its .vae" if hasattr(module, "vae") else ""
            raise TypeError(f"module must be diffusers' AutoencoderKLWan or Wan's VAE, got {shown(module)}{hint}")
        held = held_by(module)
        if not normalised:
            held = replace(held, mean=[0.0] * len(held.mean), std=[1.0] * len(held.std))
        weight = held.state["post_quant_conv.weight"]
        net = load_net(held, dtype=dtype or weight.dtype, device=weight.device, convolutions=convolutions)
        return cls(net, memory=memory, graphs=graphs)

    @torch.no_grad()
    def decode_video(self, latents: Tensor) -> Tensor:
        """A whole video, in tiles where one picture at a time exceeds ``memory``; what came before is forgotten.

        Args:
            latents: [B, F, C, h, w], all of them.

        Returns:
            [B, pictures, 3, height, width] in -1..1.

        Raises:
            ValueError: The latents have another shape, or ``memory`` does not suffice for the smallest tiles.
        """
        self.reset()
        self.validate_latents(latents)
        batch, count, _, height, width = latents.shape
        cut = self.cut(count, batch=batch, height=height, width=width)
        if cut.rows * cut.columns == 1:
            pictures = self.decode(latents)
            self.reset()
            return pictures
        if self.graphs is not None:
            self.graphs.give_way(0)
        net, at_once = self.net, frames_at_once(self.net.sizes, cut.pictures)
        wide = batch, count, height, width, net.sizes.widths[0]
        features = torch.empty(wide, dtype=self.dtype, device=self.device)
        for i, frame in enumerate(net.middle(latents.to(self.device), Past())):
            features[:, i : i + 1] = frame
        del frame
        shape = batch, self.temporal * (count - 1) + 1, height * self.spatial, width * self.spatial, 3
        out, margin, finite = torch.empty(shape, dtype=self.dtype, device=self.device), reach(net.sizes), []
        for row in spans(height, cut.rows, margin):
            for column in spans(width, cut.columns, margin):
                tile, done = features[:, :, row.start : row.stop, column.start : column.stop], 0
                for made in net.rise(tile, Past(), at_once):
                    for axis, span in ((2, row), (3, column)):
                        made = made.narrow(axis, self.spatial * span.first, self.spatial * span.kept)
                    finite.append(all_finite(made))
                    place = out[:, done : done + made.shape[1]]
                    for axis, span in ((2, row), (3, column)):
                        place = place.narrow(axis, self.spatial * (span.start + span.first), made.shape[axis])
                    self._write(made, place)
                    done += made.shape[1]
        self.finite = torch.stack(finite).all()
        return out.movedim(-1, 2)

    def cut(self, count: int, *, batch: int, height: int, width: int) -> Cut:
        """How ``decode_video`` cuts a video of so many latent frames; the arguments are those of ``pictures_at_once``.

        Raises:
            ValueError: ``memory`` does not suffice.
        """
        peak = lambda cut: self.peak_bytes(cut.pictures, batch=batch, height=height, width=width, count=count, cut=cut)
        whole = [Cut(pictures, 1, 1) for pictures in self._steps(count, batch * height * width)]
        sides = range(1, MOST_TILES + 1)
        tiles = [Cut(p, r, c) for p in (self.temporal, 1) for r in sides for c in sides if r <= height and c <= width]
        margin = reach(self.net.sizes)
        computed = lambda cut: sum(
            (r.stop - r.start) * (c.stop - c.start)
            for r in spans(height, cut.rows, margin)
            for c in spans(width, cut.columns, margin)
        )
        tiles = sorted((cut for cut in tiles if cut.rows * cut.columns > 1), key=computed)
        allowed = self._allowed()
        for cut in (*whole, *tiles):
            if peak(cut) <= allowed:
                return cut
        if self.memory is None:
            return Cut(1, 1, 1)
        least = min((peak(cut) for cut in (*whole, *tiles)), default=0)
        raise ValueError(self._too_little(least, batch, height, width, f"in {MOST_TILES} tiles to a side"))

    def another(self) -> "WanDecoder":
        """A decoder for another video, with the same weights; a graph is captured for it alone."""
        return WanDecoder(self.net, memory=self.memory, graphs=self.graphs is not None)

    def reset(self) -> None:
        """Forget the video so far: the next latents begin another one."""
        self._kept = Past()

    def state(self) -> dict[str, Tensor]:
        held = self._kept.held
        return {name: tensor.clone() for name, tensor in held.items()} if isinstance(held, InPlace) else dict(held)

    def restore(self, state: dict[str, Tensor]) -> None:
        expected = {name: conv.in_channels for name, conv in self.net.causal().items()}
        widths = {name: tensor.shape[-1] for name, tensor in state.items() if tensor.dim() == 5}
        if state and (widths != expected or len(widths) != len(state)):
            raise ValueError(f"expected the state of a decoder of {len(expected)} convolutions, got {some_of(state)}")
        held = {name: tensor.to(self.device, self.dtype).contiguous() for name, tensor in state.items()}
        self._kept = Past(held)

    def pictures_at_once(self, count: int, *, batch: int, height: int, width: int) -> int:
        """How many pictures are computed together.

        Args:
            count: Latent frames of a call.
            batch: Videos.
            height: Of a latent frame.
            width: Of a latent frame.

        Raises:
            ValueError: ``memory`` was given, and does not suffice for one.
        """
        peak = lambda pictures: self.peak_bytes(pictures, batch=batch, height=height, width=width)
        allowed = self._allowed()
        steps = self._steps(count, batch * height * width)
        found = next((pictures for pictures in steps if peak(pictures) <= allowed), None)
        if found is None and self.memory is not None:
            raise ValueError(self._too_little(peak(1), batch, height, width, "one picture at a time"))
        return found or 1

    def _steps(self, count: int, places: int) -> list[int]:
        """Numbers of pictures to compute together, the largest first; more than one only where they can be counted."""
        whole = range(count * self.temporal, 0, -self.temporal)
        steps = [*whole, *sorted({*self.net.sizes.stretch} - {self.temporal}, reverse=True)]
        return [pictures for pictures in steps if pictures == 1 or is_countable(self.net.sizes, pictures, places)]

    def _too_little(self, needed: int, batch: int, height: int, width: int, how: str) -> str:
        size = f"{height * self.spatial}x{width * self.spatial}"
        videos = f"{batch} video{'s' * (batch > 1)} of {size}, {how}"
        return f"memory must be at least {needed / 1e9:.3g} GB for {videos}, got {self._allowed() / 1e9:.3g} GB"

    def peak_bytes(
        self, pictures: int, *, batch: int, height: int, width: int, count: int = 0, cut: Cut | None = None
    ) -> int:
        """The most bytes that tensors take, weights, past and pictures in the making.

        Latents, finished pictures and what libraries want as workspace come on top.

        Args:
            pictures: Computed together.
            batch: Videos.
            height: Of a latent frame.
            width: Of a latent frame.
            count: Latent frames of the video, where it is cut into tiles.
            cut: Into how many; None for no cut in space.
        """
        sizes = self.net.sizes
        if cut is None or cut.rows * cut.columns == 1:
            places, features = height * width, 0
            elements = places * sum(count_elements(sizes, pictures))
        else:
            longest = lambda side, parts: max(s.stop - s.start for s in spans(side, parts, reach(sizes)))
            places, features = longest(height, cut.rows) * longest(width, cut.columns), count * sizes.widths[0]
            middle = sum(count_elements(sizes, 1)) - sum(count_elements(sizes, 1, middle=False))
            first = frames_at_once(sizes, pictures)[0] * sizes.widths[0]  # a copy of the part that is computed
            tile = places * (sum(count_elements(sizes, pictures, middle=False)) + first)
            elements = height * width * features + max(tile, height * width * (middle + 9 * sizes.widths[0]))
        return self._weights + batch * elements * self.dtype.itemsize

    def graph_bytes(self, count: int, *, batch: int, height: int, width: int) -> int:
        """The bytes that the graph of a chunk holds for as long as it is held, weights apart.

        They are what ``peak_bytes`` counts, the latents as they come and as they are taken, and the pictures before
        they are rounded. The arguments are those of ``pictures_at_once``.
        """
        pictures = self.pictures_at_once(count, batch=batch, height=height, width=width)
        peak = self.peak_bytes(pictures, batch=batch, height=height, width=width)
        latents = 2 * self.channels * max(4, self.dtype.itemsize)
        made = self.temporal * 3 * self.spatial**2 * self.dtype.itemsize
        return peak - self._weights + batch * count * height * width * (latents + made)

    def _write(self, pictures: Tensor, out: Tensor) -> None:
        if out.dtype == torch.uint8:
            to_bytes(pictures, out)
        else:
            super()._write(pictures, out)

    def _allowed(self) -> int:
        if self.memory is not None:
            return self.memory
        if self.device.type != "cuda":
            return ON_CPU
        return torch.cuda.get_device_properties(self.device).total_memory // 4

    def _past(self) -> tuple[int, int, int] | None:
        if not self._kept:
            return None
        first = self._kept.held["conv_in"]
        return first.shape[0], first.shape[2], first.shape[3]

    def _pictures(self, frames: Tensor, *, first: bool) -> Iterator[Tensor]:
        batch, count, _, height, width = frames.shape
        pictures = self.pictures_at_once(count, batch=batch, height=height, width=width)
        at_once = frames_at_once(self.net.sizes, pictures)
        if self.graphs is not None:
            room = self._allowed() - self.peak_bytes(pictures, batch=batch, height=height, width=width)
            takes = self.graph_bytes(count, batch=batch, height=height, width=width)
            if not first and (made := self.graphs(frames, self._kept, at_once, takes=takes, room=room)) is not None:
                return iter(made)
            self.graphs.give_way(room)
        return self.net(frames, self._kept, at_once)
