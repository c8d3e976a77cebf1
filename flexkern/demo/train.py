"""Train the demo model: teacher forcing on clips of the synthetic world, two CPU cores and an hour.

    python -m flexkern.demo.train --minutes 60

Every chunk of a clip is denoised at its own random noise level while it sees the clean chunks before it: the sequence
holds the clip twice, clean and noisy, and ``TeacherForcing`` lets a noisy chunk see the clean past and itself. That is
what the autoregressive loop does later, through the same ``CausalWan.forward``. The head predicts x0, weighted by 1 /
t (between an x0 and a flow loss): flow does not fit through a network this narrow. Clips grow from 3 to 9 to 21
frames, because what shapes look like and how they move can be learned from short, cheap ones; short ones stay in the
mix to the end, because the first chunk is the hardest: it has no past to lean on. Weights are float32 masters of a
bfloat16 model; matrices inside blocks follow Muon, the rest AdamW.
"""

import csv
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

from flexkern.render.signals import leave_at_once, quietly

if __name__ == "__main__":  # before anything heavy is loaded
    leave_at_once("flexkern.demo.train")

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn

from flexkern.backends import Pointwise
from flexkern.demo import world
from flexkern.kernels import reference
from flexkern.model.wan import CausalWan, WanConfig
from flexkern.model.weights import load_transformer
from flexkern.plan import band_split, place_turns, turns
from flexkern.policies import PositionPolicy

CHUNK = 3
SHIFT = 5.0  # of noise levels towards noise, as at inference
CONFIG = WanConfig(
    dim=256, ffn_dim=512, num_heads=4, num_layers=6, in_dim=3, out_dim=3, patch_size=(1, 6, 6),
    text_len=world.TEXT_LEN, text_dim=world.TEXT_DIM, freq_dim=128, prediction="x0",
)  # fmt: skip
CLIPS = {3: 32, 9: 16, world.TRAIN_FRAMES: 8}  # clips of a batch by their length in frames
GROWTH = (  # until this share of the time: odds of each length
    (0.08, (1, 0, 0)),
    (0.45, (0, 1, 0)),
    (1.0, (0.2, 0.3, 0.5)),
)


class TeacherForcing:
    """Memory for training: a clip's clean chunks but the last, then all its noisy chunks; attention chunk by chunk.

    A clean chunk sees the clean chunks up to itself, a noisy chunk the clean ones before it and itself.
    """

    ops: Pointwise = reference

    def __init__(self, frames: int, rows: int, columns: int, head_dim: int, device: str = "cpu"):
        time_pairs = band_split(head_dim)[0]
        frequency = torch.from_numpy(PositionPolicy(mode="none").frequencies(time_pairs))
        index = torch.cat((torch.arange(frames - CHUNK), torch.arange(frames)))
        temporal = turns(index.double()[:, None] * frequency)
        place = place_turns(rows, columns, head_dim)
        shape = len(index), len(place), -1, 2
        turn = torch.cat((temporal[:, None].expand(shape), place[None].expand(shape)), dim=2)
        self.turn = turn[:, :, None].to(device)
        self.chunks, self.tokens = frames // CHUNK, CHUNK * len(place)

    def attend(
        self, layer: int, query: Tensor | None, key: Tensor, value: Tensor, norms: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attention of a clip at once; as ``flexkern.memory.Memory.attend``, always with a query."""
        assert query is not None, "training has no pass for keys and values alone"
        query_, key = (
            reference.rotate(reference.split_pairs(reference.rms_norm(x.flatten(-2), w).view_as(x)), self.turn)
            for x, w in zip((query, key), norms, strict=True)
        )
        # [B, H, chunks, tokens, D], clean chunks first
        q, k, v = (x.flatten(1, 2).transpose(1, 2).unflatten(2, (-1, self.tokens)) for x in (query_, key, value))
        past = self.chunks - 1
        clean, noisy = [], []
        for c in range(self.chunks):
            keys, values = (torch.cat((x[:, :, :c], x[:, :, past + c, None]), 2).flatten(2, 3) for x in (k, v))
            noisy.append(attention(q[:, :, past + c], keys, values))
            if c < past:
                clean.append(attention(q[:, :, c], k[:, :, : c + 1].flatten(2, 3), v[:, :, : c + 1].flatten(2, 3)))
        return torch.cat((*clean, *noisy), dim=2).transpose(1, 2).reshape(query.shape)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain softmax attention; fused by torch.compile it trains faster on a CPU than the flash kernel there."""
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return logits.softmax(-1) @ value


def denoise_loss(
    model: CausalWan, clip: Tensor, text: Tensor, memory: TeacherForcing, noise: Tensor, t: Tensor
) -> Tensor:
    """Mean of (x0 - clip)^2 / t over a batch. clip, noise: [B, F, 3, h, w]; t: [B, F] in 0..1; text: [B, L,
    text_dim].
    """
    level = t[:, :, None, None, None]
    noisy = (1 - level) * clip + level * noise
    history = (
        clip[:, :-CHUNK] + 0.05 * noise[:, :-CHUNK] * t[:, CHUNK:, None, None, None]
    )  # what the loop will feed back
    timesteps = 1000 * torch.cat((torch.zeros_like(t[:, CHUNK:]), t), dim=1)
    out = model(torch.cat((history, noisy), dim=1), timesteps, model.text_keys(text, memory.ops), memory)
    return ((out[:, -clip.shape[1] :].float() - clip).square() / level.clamp_min(0.08)).mean()


def draw_batch(
    scenes: list[world.Scene], frames: int, batch: int, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """clip, text, noise, t of a random batch; each chunk has one noise level."""
    chosen = random.choices(scenes, k=batch)
    clip = world.clips(chosen, frames)
    u = torch.rand(batch, frames // CHUNK)
    t = (SHIFT * u / (1 + (SHIFT - 1) * u)).repeat_interleave(CHUNK, dim=1)
    text = torch.stack([world.embed(scene) for scene in chosen])
    return clip.to(device), text.to(device), torch.randn_like(clip).to(device), t.to(device)


class Trainer:
    """Float32 master weights, the bfloat16 model they train, and their running average, which is what is kept."""

    def __init__(
        self, config: WanConfig, device: str, start: Path | None = None, kind: type[CausalWan] = CausalWan
    ):  # fmt: skip
        """start: weights to continue from, None for fresh ones of the given kind.

        Raises NotImplementedError where torch has no Muon yet.
        """
        if not hasattr(torch.optim, "Muon"):
            raise NotImplementedError(
                f"training needs torch.optim.Muon, of torch 2.9; torch {torch.__version__} has none"
            )
        model = kind(config)
        nn.init.zeros_(model.head.head.weight)
        if start is not None:
            model = load_transformer(start, dtype=torch.float32)
        model = model.to(device)
        self.master = {name: nn.Parameter(p.detach().float().clone()) for name, p in model.named_parameters()}
        self.average = {name: p.detach().clone() for name, p in self.master.items()}
        self.model = model.bfloat16().requires_grad_()
        self.working = dict(self.model.named_parameters())
        self.steps = 0
        inner = [name for name, p in self.master.items() if p.dim() == 2 and name.startswith("blocks.")]
        matrices = [self.master[name] for name in inner]
        others = [p for name, p in self.master.items() if name not in inner]
        self.optimizers = (
            torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
        )

    def step(self, loss: Tensor, rate: float) -> None:
        """Follow the gradient of a loss of ``model``."""
        loss.backward()
        for name, p in self.master.items():
            working = self.working[name]
            assert working.grad is not None, f"{name} has no gradient"
            p.grad, working.grad = working.grad.float(), None
        nn.utils.clip_grad_norm_(self.master.values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        kept = min(0.997, self.steps / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_copy_(list(self.working.values()), list(self.master.values()))
            torch._foreach_lerp_(list(self.average.values()), list(self.master.values()), 1 - kept)
        self.steps += 1

    def save(self, path: Path) -> None:
        """Write the average in bfloat16 with the model's config, atomically."""
        unfinished = path.with_suffix(".part")
        weights = {name: p.detach().bfloat16().contiguous().cpu() for name, p in self.average.items()}
        save_file(weights, unfinished, {"flexkern_config": json.dumps(self.model.config.to_dict())})
        unfinished.replace(path)


@dataclass(kw_only=True)
class Args:
    """How to train."""

    minutes: float = 60.0
    steps: int | None = None  # stop after so many instead of after so many minutes
    start: Path | None = None  # continue from these weights, on clips of mixed length
    seed: int = 0
    rate: float = 2e-3  # peak learning rate
    out: Path = Path("demo.safetensors")
    log: Path = Path("training.csv")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: bool = True


def train(args: Args) -> None:
    """Train to the end of the given time; the weights are written every two minutes, the log with every line of it.

    Raises NotImplementedError where torch has no Muon yet.
    """
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    trainer = Trainer(CONFIG, args.device, args.start)
    loss_of = torch.compile(denoise_loss, dynamic=False) if args.compile else denoise_loss
    scenes = [scene for scene in world.all_scenes() if not world.held_out(scene)]
    grid = trainer.model.grid(world.SIZE, world.SIZE)
    memories = {frames: TeacherForcing(frames, *grid, CONFIG.head_dim, args.device) for frames in CLIPS}
    clips, smooth, began, saved = 0, None, time.time(), time.time()
    passed = lambda: trainer.steps / args.steps if args.steps else (time.time() - began) / (60 * args.minutes)
    with args.log.open("w", newline="", buffering=1, encoding="utf-8") as file:
        log = csv.writer(file)
        log.writerow(("step", "clips", "frames", "seconds", "rate", "loss"))
        while (share := passed()) < 1:
            odds = next(odds for until, odds in GROWTH if share < until)
            frames = random.choices(list(CLIPS), GROWTH[-1][1] if args.start else odds)[0]
            clip, text, noise, t = draw_batch(scenes, frames, CLIPS[frames], args.device)
            loss = loss_of(trainer.model, clip, text, memories[frames], noise, t)
            rate = args.rate * min(1, (trainer.steps + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * share))
            trainer.step(loss, rate)
            clips += CLIPS[frames]
            smooth = loss.item() if smooth is None else 0.97 * smooth + 0.03 * loss.item()
            if trainer.steps % 25 == 0:
                seconds = f"{time.time() - began:.0f}"
                log.writerow((trainer.steps, clips, frames, seconds, f"{rate:.6f}", f"{smooth:.5f}"))
                print(f"step {trainer.steps}  {frames} frames  {seconds} s  loss {smooth:.5f}", flush=True)
            if time.time() - saved > 120:
                trainer.save(args.out)
                saved = time.time()
    trainer.save(args.out)


if __name__ == "__main__":
    with quietly("flexkern.demo.train"):
        train(tyro.cli(Args, description=__doc__))
