"""Time a chunk of video: Wan 2.1 1.3B with random weights, four denoising passes and the clean one, per backend.

python bench/bench_end_to_end.py --save

Needs numpy. Errors are those of the first pass of the first chunk, against the same weights in float32. Pictures per
second and peak memory are those of the transformer and its cache: there is no VAE and no text encoder.
"""

import math
import resource
import sys
import time

import harness
import torch
from harness import Row
from roofs import DEVICE

from flexkern.engine import Engine
from flexkern.kernels.attention.select import selected
from flexkern.model.wan import CONFIGS, CausalWan, WanConfig
from flexkern.session import Session

PRESETS = ("flex", "longlive")  # windows of 21 and 12 frames
BACKENDS = ("triton", "sdpa")
ROUNDS = 3
PICTURES = 4  # of a latent frame
TINY = WanConfig(
    dim=64, ffn_dim=64, num_heads=1, num_layers=1, in_dim=4, out_dim=4, text_len=4, text_dim=8, freq_dim=16
)


def make_model(config: WanConfig) -> CausalWan:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return CausalWan(config).eval().requires_grad_(False)


def start_session(model: CausalWan, backend: str, preset: str, text: torch.Tensor, size: tuple[int, int]) -> Session:
    return Engine(model, backend=backend, size=size).session(text, preset=preset, seed=0)


def one_pass(session: Session) -> torch.Tensor:
    """The model's first prediction for the next chunk, in float32."""
    predictions: list[torch.Tensor] = []
    hook = session.engine.model.register_forward_hook(lambda model, inputs, output: predictions.append(output))
    try:
        session.step()
    finally:
        hook.remove()
    return predictions[0].float()


def chunk_ms(session: Session) -> float:
    """Milliseconds of the next chunk, until the GPU is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    chunk = session.step()
    chunk.latents.sum().item()
    return 1000 * (time.perf_counter() - start)


def errors(model: CausalWan, backends: tuple[str, ...], text: torch.Tensor, size: tuple[int, int]) -> dict[str, float]:
    """Relative mean error of every backend's first pass in bfloat16. Turns ``model`` to bfloat16."""
    exact = one_pass(start_session(model, "sdpa", PRESETS[0], text, size))
    model.bfloat16()
    found = {}
    for backend in backends:
        out = one_pass(start_session(model, backend, PRESETS[0], text, size))
        found[backend] = ((out - exact).abs().mean() / exact.abs().mean()).item()
    return found


def race(sessions: dict[str, Session], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per chunk of every session, in interleaved rounds: A A B B, B B A A, ..."""
    taken: dict[str, list[float]] = {backend: [] for backend in sessions}
    for i in range(rounds):
        for backend in list(sessions)[:: 1 if i % 2 == 0 else -1]:
            taken[backend] += [chunk_ms(sessions[backend]) for _ in range(2)]
    return taken


def fill(session: Session) -> None:
    """Step until the window is full."""
    for _ in range(math.ceil(session.preset.retention.window / session.engine.chunk)):
        session.step()


def allocated() -> int:
    """Bytes that are allocated on the GPU; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


def start_full(
    model: CausalWan, backend: str, preset: str, text: torch.Tensor, size: tuple[int, int], *, full: bool
) -> tuple[Session, float]:
    """A session, its window filled if ``full``, and the most that is allocated while it makes a chunk, in 1e9 bytes.

    Memory of sessions that were there before does not count. On a CPU it is the peak of the process, all included.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    others = max(0, allocated() - weights)
    session = start_session(model, backend, preset, text, size)
    if full:
        fill(session)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        session.step()
        return session, (torch.cuda.max_memory_allocated() - others) / 1e9
    return session, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    args = harness.arguments(__doc__).parse_args()
    out, is_tiny = harness.folder(args), args.tiny or DEVICE == "cpu"
    name, config, size = ("tiny", TINY, (4, 4)) if is_tiny else ("1.3B", CONFIGS["1.3B"], (60, 104))
    model = make_model(config)
    text = torch.randn(1, config.text_len, config.text_dim, device=DEVICE)
    error = errors(model, BACKENDS, text, size)
    faults = {backend: "" if error[backend] <= 2 * error["sdpa"] else "wrong" for backend in BACKENDS}
    for preset in PRESETS[:1] if is_tiny else PRESETS:
        good = [backend for backend in BACKENDS if not faults[backend]]
        started = {name: start_full(model, name, preset, text, size, full=not is_tiny) for name in good}
        sessions = {backend: session for backend, (session, _) in started.items()}
        taken = race(sessions, 1 if is_tiny else ROUNDS)
        window, chunk = sessions["sdpa"].preset.retention.window, sessions["sdpa"].engine.chunk
        around = harness.conditions(sessions[good[0]].step)
        rows = []
        for backend in BACKENDS:
            ms_20, ms, ms_80 = harness.quantiles(taken.get(backend, [math.nan]))
            about = dict(kernel="end_to_end", provider=backend, note=faults[backend], error=error[backend])
            if backend == "triton" and backend in sessions:
                about["path"] = selected(model.device, config.head_dim, model.dtype).path
            about["shape"] = f"{name} {size[0]}x{size[1]} {preset} window {window} bfloat16, random weights"
            _, peak = started.get(backend, (None, math.nan))
            figures = dict(ms=ms, ms_20=ms_20, ms_80=ms_80, pictures_s=PICTURES * chunk * 1000 / ms, peak_gb=peak)
            rows.append(Row(**about, **figures, **around, **harness.provenance()))
            harness.show(rows[-1], as_json=args.json)
        if out:
            harness.save(rows, out / "end_to_end.csv")


if __name__ == "__main__":
    main()
