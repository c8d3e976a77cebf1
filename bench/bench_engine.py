"""Time a chunk of Wan 2.1 with random weights at full size: the engine's backends beside an eager research pipeline.

python bench/bench_engine.py --save
python bench/bench_engine.py --model 14B --presets longlive
python bench/bench_engine.py --paths triton --trace chunk.json      # for Perfetto; of the first path and preset

Needs numpy, and diffusers for the VAE; without it nothing is decoded. Every path is judged first: its first two chunks
in bfloat16, against the same weights in float32. Those that are right are timed in turns, their windows full. There is
no text encoder. ``engine_paths.py`` has the paths, ``breakdown.py`` cuts the trace of a chunk.
"""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import machine
import roofs
import torch
from breakdown import ChunkRow, Parts, count_flops, slope, trace
from engine_paths import CHUNK, Made, Setup, Way, count_bytes, ways
from roofs import DEVICE, Roofs, allocated

from flexkern.finite import NotFiniteError
from flexkern.model.savings import fold_padding
from flexkern.model.schedule import Schedule
from flexkern.model.wan import CONFIGS, CausalWan, WanConfig
from flexkern.noise import PolicyNoise
from flexkern.policies import get_preset
from flexkern.policies.position import HORIZON

PRESETS = ("longlive", "flex")  # windows of 12 and 21 frames
PICTURES = 4  # of a latent frame
STRIDE = 8  # of a picture's pixels over those of its latent
PROMPT = 120  # tokens of the prompt, a long one; the rest of its rows is padding
JUDGED = 2  # chunks
WARM = 2  # chunks
ROUNDS = 4
SHARE = 0.3  # of the time of the first path, for each of the others
SPARE = 12e9  # bytes beside weights and caches: activations and the VAE
TINY = WanConfig(dim=64, ffn_dim=64, num_heads=1, num_layers=1, text_len=4, text_dim=8, freq_dim=16)
SMALL = {"retention.window": JUDGED * CHUNK, "retention.sink": CHUNK}


@dataclass(kw_only=True)
class Racer:
    """A path in the race, its window full.

    first: milliseconds until its first pictures are there. before: of each chunk until the window was full. own: bytes
    that it holds between chunks, the weights among them. peak, device: 1e9 bytes, as in ``ChunkRow``. decoding: ms a
    chunk of what is decoded at the end.
    """

    way: Way
    first: float
    before: list[float]
    own: float
    peak: float
    device: float
    taken: list[Made] = field(default_factory=list)
    grown: list[float] = field(default_factory=lambda: [0.0])
    decoding: float = 0.0

    def run(self, seconds: float, chunks: int) -> None:
        """At least one chunk more, until the time is up or there are so many in all."""
        end = time.perf_counter() + seconds
        while True:
            before = held()
            self.taken.append(self.way.step())
            self.grown.append(self.grown[-1] + held() - before)
            if time.perf_counter() >= end or len(self.taken) >= chunks:
                return

    def finish(self) -> None:
        """Decode what is not decoded yet; where there is anything, only then are the first pictures there."""
        before, used = allocated(), in_use()
        forget_peak()
        if decoding := self.way.finish():
            made = [*self.before, *(made.ms for made in self.taken)]
            self.first, self.decoding = sum(made) + decoding * len(made), decoding
            self.peak = max(self.peak, peak_of(self.own - before))
            self.device += (in_use() - used) / 1e9


def held() -> float:
    """Bytes that are held now: on the GPU, or by the process on a CPU."""
    return allocated() if DEVICE == "cuda" else machine.resident()


def in_use() -> float:
    """Bytes of the GPU that are in use, by its driver; NaN on a CPU."""
    if DEVICE == "cpu":
        return math.nan
    free, total = torch.cuda.mem_get_info()
    return total - free


def tidy() -> None:
    """Give back the memory of videos that ended: a session and its chunks refer to each other."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def forget_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_of(own: float) -> float:
    """The most that was allocated since the peak was forgotten, and ``own`` bytes more; on a CPU of the process."""
    return (torch.cuda.max_memory_allocated() + own if DEVICE == "cuda" else machine.peak_resident()) / 1e9


def make_model(config: WanConfig) -> CausalWan:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return CausalWan(config).eval().requires_grad_(False)


def make_vae(*, is_tiny: bool) -> Any:
    """diffusers' module in bfloat16, None where diffusers is not installed."""
    if find_spec("diffusers") is None:
        return None
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoencoderKLWan(base_dim=8 if is_tiny else 96).eval().requires_grad_(False).bfloat16()


def describe_fault(fault: Exception) -> str:
    """Why a path is not timed: it cannot run here, or it broke."""
    refused = isinstance(fault, ValueError | ImportError) and not isinstance(fault, NotFiniteError)
    kind = "absent" if refused else f"failed: {type(fault).__name__}"
    return f"{kind}: {' '.join(str(fault).split())[:300]}"


def render(name: str, setup: Setup) -> torch.Tensor:
    """Latents of the first chunks of a path, of the preset's noise."""
    preset, config = setup.preset.for_horizon(HORIZON).resolve(), setup.model.config
    way = ways()[name](setup)
    way.begin(PolicyNoise(preset.noise, 0, 1, (config.out_dim, *setup.size), None))
    made = []
    for _ in range(JUDGED):
        way.step()
        made.append(way.latents.double().cpu())
    way.end()
    tidy()
    return torch.cat(made, dim=1)


def judge(setup: Setup, names: Sequence[str]) -> dict[str, tuple[float, str]]:
    """Error of each path in bfloat16, and why it must not be timed. Turns the model to bfloat16.

    The error is relative to the mean magnitude. A path may have twice that of sdpa.
    """
    exact = render("sdpa", setup)
    setup.model.bfloat16()
    off = lambda made: ((made - exact).abs().mean() / exact.abs().mean()).item()
    entitled, found = off(render("sdpa", setup)), {}
    for name in names:
        try:
            error = off(render(name, setup))
            found[name] = error, "" if error <= 2 * entitled else f"wrong: sdpa is off by {entitled:.2g}"
        except Exception as fault:  # a path may fail in any way; the others are still wanted
            found[name] = math.nan, describe_fault(fault)
    return found


def start(name: str, setup: Setup, chunks: int) -> Racer:
    """A path whose window is full after so many chunks. Its kernels are compiled before its first chunk is timed."""
    tidy()
    before, used = allocated(), in_use()
    way = ways()[name](setup)
    way.begin()
    for _ in range(WARM):
        way.step()
    way.end()
    tidy()
    began = time.perf_counter()
    way.begin()
    filling = [way.step().ms]
    first = 1000 * (time.perf_counter() - began)
    filling += [way.step().ms for _ in range(chunks - 1)]
    own, now = allocated() - before + way.shared, allocated()
    forget_peak()
    filling.append(way.step().ms)
    device = (in_use() - used + way.shared) / 1e9
    return Racer(way=way, first=first, before=filling, own=own, peak=peak_of(own - now), device=device)


def race(racers: Sequence[Racer], *, seconds: float, chunks: int, rounds: int) -> None:
    """Chunks of every path, in interleaved rounds: A B C, C B A, ...; the first gets most of the time and chunks."""
    for i in range(rounds):
        for racer in racers[:: 1 if i % 2 == 0 else -1]:
            share = 1.0 if racer is racers[0] else SHARE
            racer.run(seconds * share / rounds, math.ceil(chunks * share * (i + 1) / rounds))


def row_of(racer: Racer, parts: Parts, *, flops: int, roof: Roofs, shows: bool) -> dict[str, Any]:
    """The measured columns of a row; ``shows``: whether pictures come of it, or latents alone."""
    decoded = [made.ms + racer.decoding for made in racer.taken]
    denoised = [made.denoise_ms for made in racer.taken]
    ms_20, ms, ms_80 = harness.quantiles(decoded)
    denoise_ms, pictures = statistics.median(denoised), 1000 * PICTURES * CHUNK
    last = lambda values: statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
    roof_ms, rate = flops / roof.matmul_tflop_s / 1e9, flops / denoise_ms / 1e9
    vae_ms = parts.vae + racer.decoding
    found = dict(ms=ms, ms_20=ms_20, ms_80=ms_80, ms_95=last(decoded), peak_gb=racer.peak, device_gb=racer.device)
    found |= dict(pictures_s=pictures / ms if shows else math.nan)
    found |= dict(denoise_ms=denoise_ms, denoise_ms_95=last(denoised), denoise_fps=pictures / denoise_ms)
    found |= dict(attention_ms=parts.attention, linear_ms=parts.linear, other_ms=parts.other, vae_ms=vae_ms)
    idle = ms - racer.decoding - parts.busy
    found |= dict(idle_ms=0.0 if idle < 0 else idle, chunks=len(racer.taken))
    found |= dict(first_picture_ms=racer.first, path=racer.way.kernel(parts), tflop_s=rate, roof_ms=roof_ms)
    found |= dict(roof_percent=100 * roof_ms / denoise_ms, over_roof_percent=100 * (denoise_ms / roof_ms - 1))
    steady = {"slope_ms": [made.ms for made in racer.taken], "slope_mb": [value / 1e6 for value in racer.grown]}
    for column, values in steady.items():
        found |= dict(zip((column, f"{column}_low", f"{column}_high"), slope(values), strict=True))
    return found


def room_for(setup: Setup, names: Sequence[str]) -> dict[str, str]:
    """Why paths, from the last on, are left out where not all of their caches fit on the GPU at once."""
    if DEVICE == "cpu":
        return {}
    config, (rows, columns) = setup.model.config, setup.model.grid(*setup.size)
    cache = 4 * config.num_layers * setup.preset.retention.pages * rows * columns * config.dim
    total = torch.cuda.mem_get_info()[1]
    fitting = int((0.95 * total - SPARE - count_bytes(setup.model)) // cache)
    why = f"absent: beside the others there is no room for its cache of {cache / 1e9:.1f} GB"
    return {name: why for name in names[max(0, fitting) :]}


def bench(
    setup: Setup, judged: dict[str, tuple[float, str]], shape: str, *, seconds: float, chunks: int, rounds: int,
    keep_trace: Path | None,
) -> list[ChunkRow]:  # fmt: skip
    """A row for each path that was judged, with one preset."""
    racers: dict[str, Racer] = {}
    faults = {name: fault for name, (_, fault) in judged.items() if fault}
    faults |= room_for(setup, [name for name in judged if name not in faults])
    window = setup.preset.retention.capacity
    for name in [name for name in judged if name not in faults]:
        # beside the chunks that are timed: a window, those of the trace, of the clocks
        most = 100 + window + math.ceil(chunks * (SHARE if racers else 1))
        try:
            racers[name] = start(name, replace(setup, most=most), math.ceil(window / CHUNK))
        except Exception as fault:  # as in judge
            faults[name] = describe_fault(fault)
    running = list(racers.values())
    race(running, seconds=seconds, chunks=chunks, rounds=rounds)
    parts = {
        name: trace(racer.way.step, keep_trace if i == 0 else None) for i, (name, racer) in enumerate(racers.items())
    }
    around = harness.conditions(lambda: [racer.way.step() for racer in running[:1]])
    steps, roof = len(Schedule().timesteps()), roofs.measure_roofs()
    read = fold_padding(setup.text, setup.model.dtype)[0].shape[1]  # rows of the prompt
    flops = count_flops(setup.model.config, setup.size, frames=CHUNK, window=window, steps=steps, text=read)
    rows = []
    for name, (error, _) in judged.items():
        figures = {}
        if name in racers:
            racers[name].finish()
            figures = row_of(racers[name], parts[name], flops=flops, roof=roof, shows=setup.vae is not None)
        about = dict(kernel="engine", provider=name, shape=shape, error=error, note=faults.get(name, ""))
        if not faults.get(name) and setup.vae is None:
            about["note"] = "nothing is decoded"
        rows.append(ChunkRow(**about, **figures, **around, **harness.provenance()))
    return rows


def describe(row: ChunkRow) -> str:
    """What ``harness.describe`` leaves out of a row that was timed."""
    parts = [f"{name} {getattr(row, f'{name}_ms'):.1f}" for name in ("attention", "linear", "other", "vae", "idle")]
    drift = f"{row.slope_ms:+.2g} ms ({row.slope_ms_low:+.2g} to {row.slope_ms_high:+.2g}), {row.slope_mb:+.2g} MB"
    drift = "" if math.isnan(row.slope_ms) else f"over 100 chunks {drift}; "
    return (
        f"    {row.chunks} chunks, p95 {row.ms_95:.1f} ms: {', '.join(parts)}; denoising {row.denoise_ms:.1f} ms, "
        f"{row.denoise_fps:.1f} pictures/s, {row.over_roof_percent:.0f} % over the roof; first pictures after "
        f"{row.first_picture_ms:.0f} ms; {drift}{row.path}"
    )


def arguments() -> argparse.ArgumentParser:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", choices=("1.3B", "14B"), default="1.3B", help="sizes of the transformer")
    parser.add_argument("--presets", nargs="+", metavar="PRESET",
                        help=f"default: {' and '.join(PRESETS)}; the first of them for a tiny run")  # fmt: skip
    parser.add_argument("--paths", nargs="+", default=list(ways()), choices=list(ways()), metavar="PATH",
                        help=f"of {', '.join(ways())}; the first gets most of the time")  # fmt: skip
    parser.add_argument("--chunks", type=int, default=200, help="at most, of each path and preset (default 200)")
    parser.add_argument("--seconds", type=float, default=40.0,
                        help=f"at most, for the first path and each preset; {SHARE} of it for others")  # fmt: skip
    parser.add_argument("--no-vae", action="store_true", help="denoise only")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="keep a Chrome trace of a chunk of the first path")
    return parser


def main() -> None:
    args = arguments().parse_args()
    out, is_tiny = harness.folder(args), args.tiny or DEVICE == "cpu"
    name, config, size = ("tiny", TINY, (4, 4)) if is_tiny else (args.model, CONFIGS[args.model], (60, 104))
    model = make_model(config)
    vae = None if args.no_vae else make_vae(is_tiny=is_tiny)
    text = torch.randn(1, config.text_len, config.text_dim, device=DEVICE)
    text[:, PROMPT:] = 0  # as encoders pad
    setup = Setup(model=model, vae=None, text=text, size=size, preset=get_preset("flex", SMALL), most=JUDGED)
    judged = judge(setup, args.paths)
    for number, chosen in enumerate(args.presets or (PRESETS[:1] if is_tiny else PRESETS)):
        preset = get_preset(chosen, SMALL if is_tiny else None)
        window = preset.retention.capacity
        length = dict(chunks=3, seconds=0.0, rounds=3) if is_tiny else dict(chunks=args.chunks, seconds=args.seconds)
        pictures = f"{STRIDE * size[0]}x{STRIDE * size[1]}"
        shape = f"{name} {pictures} {chosen} window {window} bfloat16, random weights{'' if vae else ', no VAE'}"
        rows = bench(
            replace(setup, vae=vae, preset=preset), judged, shape,
            keep_trace=args.trace if number == 0 else None, **{"rounds": ROUNDS} | length,
        )  # fmt: skip
        for row in rows:
            harness.show(row, as_json=args.json)
            if not args.json and not math.isnan(row.ms):
                print(describe(row))
        if out:
            harness.save(rows, out / "engine.csv")


if __name__ == "__main__":
    main()
