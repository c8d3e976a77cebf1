"""Time the VAE's decoder, ours and diffusers': a chunk of three latents with the past of a chunk, random weights.

python bench/bench_vae.py --save
python bench/bench_vae.py --save --tiny-decoder taew2_1.pth     # beside them, for previews: no error is told of it

A chunk of each decoder is traced, and cut by kind of kernel. Errors are those of three chunks, against diffusers'
decoder in float32; one that exceeds what diffusers' own decoder in bfloat16 has is wrong, and not timed. Without
diffusers, ours stands in for it in both.
"flexkern, graph" captures the third chunk and replays it from then on; its peak is that of capturing.
Operations are those that the mathematics needs, with the doubling of height and width folded into the convolution after
it.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import machine
import roofs
import torch
from breakdown import traced
from harness import Truth
from roofs import DEVICE, allocated
from torch import Tensor
from vae_split import VaeRow, split

from flexkern.model.decoder import ChunkDecoder
from flexkern.model.tiny_decoder import load_tiny_decoder
from flexkern.model.vae import DiffusersDecoder, WanDecoder, WanVAE
from flexkern.model.vae.net import PUBLISHED, Convolutions, DecoderNet, Sizes

FRAMES = 3  # latents of a chunk
ROUNDS = 4
SIZES = {"480x832": (60, 104), "720x1280": (90, 160)}
TINY = {"32x48": (4, 6)}
LAST = torch.channels_last_3d
PREVIEW = "tiny decoder"


@dataclass(frozen=True, kw_only=True)
class OwnWeights:
    """Random weights of our decoder, in place of diffusers' module."""

    sizes: Sizes
    dtype: torch.dtype = torch.float32

    def bfloat16(self) -> "OwnWeights":
        """The same weights, rounded."""
        return replace(self, dtype=torch.bfloat16)

    def net(self) -> DecoderNet:
        """The network with them."""
        torch.manual_seed(0)
        return DecoderNet.random(self.sizes, dtype=self.dtype, device=DEVICE)


Module = Any
"""diffusers' AutoencoderKLWan, or ``OwnWeights``"""


def make_module(*, is_tiny: bool) -> Module:
    """Random weights of Wan's sizes in float32, or an eighth to a twelfth as wide."""
    base = 8 if is_tiny else 96
    if find_spec("diffusers") is None:
        return OwnWeights(sizes=PUBLISHED._replace(widths=tuple(width * base // 96 for width in PUBLISHED.widths)))
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoencoderKLWan(base_dim=base).eval().requires_grad_(False)


def ours(module: Module, *, graphs: bool = False, convolutions: Convolutions = "library") -> WanDecoder:
    if isinstance(module, OwnWeights):
        return WanDecoder(module.net().convolve_with(convolutions), graphs=graphs)
    return WanDecoder.from_module(module, graphs=graphs, convolutions=convolutions)


def plain(module: Module) -> ChunkDecoder:
    """The decoder that others are judged by: diffusers', or ours."""
    return ours(module) if isinstance(module, OwnWeights) else theirs(module)


def theirs(module: Module, *, last: bool = False, compiled: bool = False) -> DiffusersDecoder:
    """diffusers' decoder in a copy of the module, which it may change."""
    vae = WanVAE(copy.deepcopy(module), backend="diffusers")
    if last:
        for conv in vae.module.modules():
            if isinstance(conv, torch.nn.Conv3d):
                conv.weight.data = conv.weight.data.contiguous(memory_format=LAST)
    if compiled:
        vae.module.decoder = torch.compile(vae.module.decoder)
    return DiffusersDecoder(vae)


PROVIDERS: dict[str, Callable[[Module], ChunkDecoder]] = {
    "flexkern": ours,
    "flexkern, graph": partial(ours, graphs=True),
    "flexkern, own convolutions": partial(ours, convolutions="hopper"),
    "diffusers": theirs,
    "diffusers, channels last": partial(theirs, last=True),
    "diffusers, channels last, compiled": partial(theirs, last=True, compiled=True),
}
NEED_GPU = {"flexkern, graph", "flexkern, own convolutions", "diffusers, channels last, compiled"}


def count_flops(sizes: Sizes, frames: int, height: int, width: int) -> int:
    """Floating-point operations of a chunk with a past: two for each product of a weight and a feature.

    Args:
        sizes: Of the decoder.
        frames: Latents.
        height: Of a latent.
        width: Of a latent.
    """
    inputs, places, total = sizes.widths[0], frames * height * width, 0
    total += places * (sizes.latent**2 + 27 * sizes.latent * inputs)
    total += places * (4 * 27 * inputs**2 + 4 * inputs**2 + 2 * height * width * inputs)  # two blocks and attention
    for level, out in enumerate(sizes.widths):
        total += places * 27 * (inputs * out + (2 * sizes.blocks + 1) * out**2)
        total += places * inputs * out if inputs != out else 0
        if level < len(sizes.doubles_time):
            if sizes.doubles_time[level]:
                total, places = total + places * 6 * out**2, 2 * places
            inputs = out // 2
            total, places = total + places * 16 * out * inputs, 4 * places
    return 2 * (total + places * 27 * sizes.widths[-1] * sizes.colours)


def chunk_ms(decoder: ChunkDecoder, latents: Tensor) -> float:
    """Milliseconds of the next chunk as bytes, until the GPU is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    decoder(latents)[0, 0, 0, 0, 0].item()
    return 1000 * (time.perf_counter() - start)


def start(make: Callable[[], ChunkDecoder], latents: Tensor) -> tuple[ChunkDecoder, Tensor, float]:
    """A decoder with a past, the pictures of its first three chunks, and the most that the third allocates, in GB.

    Its weights count, other decoders do not. On a CPU it is the peak of the process, all included.
    """
    others = allocated()
    decoder = make()
    pictures = [decoder.decode(latents).float().cpu() for _ in range(2)]
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    pictures.append(decoder.decode(latents).float().cpu())
    most = torch.cuda.max_memory_allocated() - others if DEVICE == "cuda" else machine.peak_resident()
    return decoder, torch.cat(pictures, dim=1), most / 1e9


def why_launched(decoder: ChunkDecoder) -> str | None:
    """Why a decoder with graphs has not replayed its last chunk; None if it has, and for one without."""
    return decoder.graphs.why_not if isinstance(decoder, WanDecoder) and decoder.graphs else None


def why_absent(provider: str, module: Module) -> str:
    """Why a decoder cannot run here, "" if it can."""
    if provider in NEED_GPU and DEVICE != "cuda":
        return "needs a CUDA GPU"
    lacks = isinstance(module, OwnWeights) and provider.startswith("diffusers")
    return "the package 'diffusers' is not installed" if lacks else ""


def bench(
    module: Module,
    name: str,
    size: tuple[int, int],
    names: list[str],
    rounds: int,
    tiny: Callable[[], ChunkDecoder] | None = None,
) -> list[VaeRow]:
    """A row for each provider at one size, and for a tiny decoder. The module is in float32 and stays so."""
    half = copy.deepcopy(module).bfloat16()
    sizes = ours(half).net.sizes
    latents = torch.randn(1, FRAMES, sizes.latent, *size, device=DEVICE)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # whose ten bits are hardly more than bfloat16's
        exact = start(lambda: plain(module), latents)[1].double()
    truth = Truth(exact=exact, entitled=start(lambda: plain(half), latents)[1])
    decoders: dict[str, ChunkDecoder] = {}
    found: dict[str, tuple[float, str, float]] = {}
    for provider in names:
        if why := why_absent(provider, module):
            found[provider] = math.nan, f"absent: {why}", math.nan
            continue
        try:
            decoders[provider], pictures, peak = start(partial(PROVIDERS[provider], half), latents)
            error, fault = truth.judge(pictures, 1.05, 2.0)
            if why := why_launched(decoders[provider]):
                fault = fault or f"not replayed: {why}"
        except Exception as failed:  # a peer may fail in any way; the others are still wanted
            error, peak = math.nan, math.nan
            fault = f"failed: {type(failed).__name__}: {' '.join(str(failed).split())[:300]}"
        found[provider] = error, fault, peak
        if fault:
            decoders.pop(provider, None)
    if tiny is not None:
        decoders[PREVIEW], _, peak = start(tiny, latents)
        found[PREVIEW] = math.nan, "", peak  # its pictures resemble the VAE's
    taken: dict[str, list[float]] = {provider: [] for provider in decoders}
    for i in range(rounds):
        for provider in list(decoders)[:: 1 if i % 2 == 0 else -1]:
            taken[provider] += [chunk_ms(decoders[provider], latents) for _ in range(2)]
    roof = roofs.measure_roofs()
    pictures_made, flops = FRAMES * sizes.stretch[0], count_flops(sizes, FRAMES, *size)
    parts = {name: split(traced(partial(chunk_ms, decoder, latents))) for name, decoder in decoders.items()}
    around = harness.conditions(lambda: [decoder(latents) for decoder in list(decoders.values())[:1]])
    rows = []
    for provider, (error, fault, peak) in found.items():
        ms_20, ms, ms_80 = harness.quantiles(taken.get(provider, [math.nan]))
        figures = dict(ms=ms, ms_20=ms_20, ms_80=ms_80)
        if provider != PREVIEW:  # whose operations are others
            rate = flops / ms / 1e9
            figures |= dict(tflop_s=rate, roof_percent=100 * rate / roof.matmul_tflop_s)
        about = dict(kernel="vae", provider=provider, error=error, note=fault, peak_gb=peak)
        about["shape"] = f"{name} {FRAMES} latents bfloat16, random weights"
        about["pictures_s"] = 1000 * pictures_made / ms
        rows.append(VaeRow(**about, **figures, **parts.get(provider, {}), **around, **harness.provenance()))
    return rows


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--tiny-decoder", type=Path, metavar="PATH", help="weights of a tiny decoder (taew2_1)")
    args = parser.parse_args()
    tiny = args.tiny_decoder and load_tiny_decoder(args.tiny_decoder, device=DEVICE, dtype=torch.bfloat16)
    out, is_tiny = harness.folder(args), args.tiny or DEVICE == "cpu"
    module = make_module(is_tiny=is_tiny)
    for name, size in (TINY if is_tiny else SIZES).items():
        rows = bench(module, name, size, list(PROVIDERS), 1 if is_tiny else ROUNDS, tiny)
        for row in rows:
            harness.show(row, as_json=args.json)
        if out:
            harness.save(rows, out / "vae.csv")


if __name__ == "__main__":
    main()
