"""Does a fresh clone take the fast path here without any option? Renders with random weights, and checks what ran.

python bench/default_path.py

On a GPU of compute capability 9.0 that must be the Hopper kernel alone; on another GPU what the selection says; on a
CPU the backend sdpa. Fails where something else ran, or where its first chunk is far from that of sdpa. Needs numpy.
"""

import argparse
import sys
from dataclasses import replace

import machine
import torch
from roofs import DEVICE

from flexkern.backends.choice import AUTO
from flexkern.engine import Engine
from flexkern.kernels.attention.select import selected
from flexkern.kernels.compiles import watch_compiles
from flexkern.model.families import FAMILIES
from flexkern.model.wan import WanConfig
from flexkern.warmup import stand_in

KERNELS = {"hopper": "_frame_attention_hopper", "portable": "_frame_attention"}
FAMILY = replace(FAMILIES["self-forcing"], size=(24, 24))  # 144 tokens: a whole tile of keys and a short one
CHUNKS = 3
NEAR = 0.05  # relative mean distance of two backends in bfloat16, after four passes of random weights


def tiny(head_dim: int) -> WanConfig:
    sizes = dict(ffn_dim=256, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_len=16, text_dim=16, freq_dim=32)
    return WanConfig(dim=2 * head_dim, **sizes)


def begin(head_dim: int, backend: str) -> Engine:
    torch.manual_seed(0)
    return stand_in(tiny(head_dim), FAMILY, dtype=torch.bfloat16, device=DEVICE, backend=backend)


def render(engine: Engine, chunks: int = CHUNKS) -> torch.Tensor:
    """Latents of the first chunk, once all are made."""
    torch.manual_seed(1)
    config = engine.model.config
    session = engine.session(torch.randn(1, config.text_len, config.text_dim), preset="flex", seed=0, frames=90)
    made = [session.step().latents for _ in range(chunks)]
    session.validate_chunks()
    return made[0].float()


def check(head_dim: int) -> list[str]:
    """What is wrong with the default at that head dim."""
    with watch_compiles() as compiled:
        engine = begin(head_dim, AUTO)
        first = render(engine)
    print(f"head dim {head_dim}: {engine.backend_choice}", flush=True)
    launched = {one.kernel for one in compiled} & set(KERNELS.values())
    expected = {"sdpa"} if DEVICE == "cpu" else {"triton"}
    wrong = [] if {engine.backend_name} == expected else [f"backend {engine.backend_name}, expected {expected}"]
    if DEVICE == "cuda":
        path = selected(engine.model.device, head_dim, torch.bfloat16).path
        if torch.cuda.get_device_capability() == (9, 0) and path != "hopper":
            wrong.append(f"the {path} kernel is selected on a GPU of compute capability 9.0")
        if launched != {KERNELS[path]}:
            wrong.append(f"launched {sorted(launched)}, expected {KERNELS[path]} alone")
    other = render(begin(head_dim, "sdpa"), chunks=1)
    off = ((first - other).abs().mean() / other.abs().mean()).item()
    print(f"launched: {sorted(launched) or 'no attention kernel'}; off from sdpa by {off:.2g} of the mean", flush=True)
    return wrong if off < NEAR else [*wrong, f"the first chunk is off from that of sdpa by {off:.2g} of the mean"]


def main() -> int:
    about = dict(prog=machine.program(), description=machine.described(__doc__))
    argparse.ArgumentParser(**about, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'cpu'}, commit {machine.commit()}")
    wrong = [f"head dim {dim}: {line}" for dim in (128, 64) for line in check(dim)]
    right = (
        "the default is the fast path" if DEVICE == "cuda" else "no CUDA GPU: the default is sdpa; no kernel was tried"
    )
    print("\n".join(wrong) or right)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
