"""Run the 1.3B model once at full size on a CPU: write, find and load weights, encode a prompt, decode a chunk.

python bench/full_size.py --folder full_size

Random weights of the published shapes: the transformer of Wan 2.1 1.3B in bfloat16, the whole VAE, and a UMT5 encoder
of full width with two layers and a small vocabulary. The picture is small, so that a CPU can do it.
Needs the extras model and video. Time and peak memory are printed; the peak counts mapped files.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import machine
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/support"))

import layouts  # noqa: E402

from flexkern.cli import main as command  # noqa: E402
from flexkern.model.wan import CONFIGS, CausalWan  # noqa: E402

SIZE = "64x64"  # a latent of 8x8, 16 tokens a frame


def write(folder: Path) -> None:
    """Write a checkpoint folder as Wan publishes it, with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {key: list(tensor.shape) for key, tensor in CausalWan(CONFIGS["1.3B"]).state_dict().items()}
    draw = lambda shapes, scale: {k: scale * torch.randn(shape, dtype=torch.bfloat16) for k, shape in shapes.items()}
    save_file(draw(shapes, 0.02), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "t2v"}), encoding="utf-8")
    torch.save({k: t.float() for k, t in draw(layouts.SHAPES["vae"], 0.05).items()}, folder / "Wan2.1_VAE.pth")
    text = {key: shape for key, shape in layouts.SHAPES["t5"].items() if layouts.is_early(key)}
    text["token_embedding.weight"] = [64, 4096]
    torch.save(draw(text, 0.05), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    layouts.save_tokenizer(folder / "google/umt5-xxl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="3.6 GB; weights that are there are used again")
    folder = parser.parse_args().folder
    if not (folder / "google/umt5-xxl").is_dir():
        write(folder)
    begun, before = time.perf_counter(), machine.peak_resident()
    given = ["render", "--model", "self-forcing", "--weights", folder, "--prompt", "a cat", "--size", SIZE]
    status = command([*map(str, given), "--num_output_frames", "3", "--out", str(folder / "video.mp4")])
    peak = machine.peak_resident()
    print(f"{time.perf_counter() - begun:.1f} s, peak {peak / 1e9:.1f} GB resident, {before / 1e9:.1f} GB before")
    return status


if __name__ == "__main__":
    sys.exit(main())
