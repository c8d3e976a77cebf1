"""Tiny VAE, text encoder and LoRA with the published names, and whole folders as people have them on disk."""

import json
import re
import string
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from state_dicts import kohya, low_rank, peft, prefixed, save_diffusers_root, save_wan_folder, scrambled, to_diffusers

from flexkern.model.text import _transformers_names, save_embeddings

__all__ = ["kohya", "low_rank", "peft", "prefixed", "to_diffusers"]
DATA = Path(__file__).parent.parent / "data"
SHAPES = json.loads((DATA / "part_shapes.json").read_text())
VAE_SIZES = {96: 8, 192: 16, 384: 32, 288: 24, 768: 64, 1152: 96}  # widths of the published parts: those here
TEXT_SIZES = {256384: 64, 4096: 48, 10240: 40, 64: 3}  # 48 is what the tiny transformer reads; 3 heads of 16
PROMPTS = ("a cat", "a dog")


def tiny_transformer():
    return load_file(DATA / "tiny_wan.safetensors")


def draw(shapes, sizes, scale):
    generator = torch.Generator().manual_seed(1)
    small = {key: [sizes.get(size, size) for size in shape] for key, shape in shapes.items()}
    return {key: scale * torch.randn(shape, generator=generator) for key, shape in small.items()}


def tiny_vae():
    return draw(SHAPES["vae"], VAE_SIZES, 0.1)


def is_early(key):
    """Whether a parameter of the text encoder is in its first two layers, or in none."""
    return not re.match(r"blocks\.([2-9]|\d\d)", key)


def tiny_text_encoder():
    return draw({key: shape for key, shape in SHAPES["t5"].items() if is_early(key)}, TEXT_SIZES, 0.3)


def save_tokenizer(folder):
    import tokenizers
    import transformers

    letters = [(letter, -5.0) for letter in "▁" + string.ascii_lowercase]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *letters]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(words, unk_id=2))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names).save_pretrained(folder)


def sentencepiece_model(pieces, charsmap=b""):
    """A serialized SentencePiece model of (text, score, kind), written by hand."""

    def field(number, content):
        if isinstance(content, int):
            return varint(number << 3) + varint(content)
        return varint(number << 3 | 2) + varint(len(content)) + content

    def varint(value):
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    score = lambda value: varint(2 << 3 | 5) + struct.pack("<f", value)
    listed = b"".join(field(1, field(1, text.encode()) + score(value) + field(3, kind)) for text, value, kind in pieces)
    trainer = field(3, 1) + field(4, len(pieces)) + varint(10 << 3 | 5) + struct.pack("<f", 0.9995)
    return listed + field(2, trainer) + field(3, field(1, b"nmt_nfkc") + field(2, charsmap) * bool(charsmap))


def save_prompts(file, prompts=PROMPTS, width=48):
    generator = torch.Generator().manual_seed(2)

    def encode(prompts):
        rows = torch.randn(len(prompts), 5, width, generator=generator)
        return torch.cat((rows, torch.zeros(len(prompts), 507, width)), dim=1)

    save_embeddings(file, encode, prompts)
    return file


def save_wan(folder, *, text=False):
    """The folder of Wan itself: transformer, VAE, and the text encoder with its tokenizer."""
    save_wan_folder(tiny_transformer(), folder)
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    torch.save(tiny_vae(), folder / "Wan2.1_VAE.pth")
    if text:
        save_text(folder)
    return folder


def save_text(folder):
    """The text encoder of Wan's folder, or of a diffusers one."""
    if (folder / "model_index.json").exists():
        (folder / "text_encoder").mkdir()
        renamed = {key: tensor.contiguous() for key, tensor in _transformers_names(tiny_text_encoder()).items()}
        save_file(renamed, folder / "text_encoder/model.safetensors")
        return save_tokenizer(folder / "tokenizer")
    torch.save(tiny_text_encoder(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return save_tokenizer(folder / "google/umt5-xxl")


def save_diffusers(root):
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    save_diffusers_root(tiny_transformer(), root)
    (root / "vae").mkdir()
    vae = {key: tensor.contiguous() for key, tensor in convert_wan_vae_to_diffusers(tiny_vae()).items()}
    save_file(vae, root / "vae/diffusion_pytorch_model.safetensors")
    return root


def save_self_forcing(root):
    """Self-Forcing's repository with what its README has people download."""
    (root / "checkpoints").mkdir(parents=True)
    state = tiny_transformer()
    groups = {"generator": scrambled(state), "generator_ema": prefixed(state, "model.")}
    torch.save(groups, root / "checkpoints/self_forcing_dmd.pt")
    save_wan(root / "wan_models/Wan2.1-T2V-1.3B")
    return root


def save_longlive(root):
    (root / "longlive_models/models").mkdir(parents=True)
    state = tiny_transformer()
    torch.save({"generator": prefixed(state, "model.")}, root / "longlive_models/models/longlive_base.pt")
    torch.save({"generator_lora": peft(low_rank(state))}, root / "longlive_models/models/lora.pt")
    save_wan(root / "wan_models/Wan2.1-T2V-1.3B")
    return root


def save_causvid(root):
    root.mkdir(parents=True)
    torch.save({"generator": prefixed(tiny_transformer(), "model.")}, root / "model.pt")
    torch.save(tiny_vae(), root / "Wan2.1_VAE.pth")
    return root


def save_rolling_forcing(root):
    (root / "checkpoints").mkdir(parents=True)
    fsdp = "_fsdp_wrapped_module."
    state = {"generator_ema": prefixed(tiny_transformer(), f"model.{fsdp}", fsdp)}
    torch.save(state, root / "checkpoints/rolling_forcing_dmd.pt")
    save_wan(root / "wan_models/Wan2.1-T2V-1.3B")
    return root


def save_reward_forcing(root):
    """Reward-Forcing's repository, whose checkpoint is the generator's state alone, beside Wan's folder."""
    (root / "checkpoints/Reward-Forcing-T2V-1.3B").mkdir(parents=True)
    state = prefixed(tiny_transformer(), "model.")
    torch.save(state, root / "checkpoints/Reward-Forcing-T2V-1.3B/rewardforcing.pt")
    save_wan(root / "checkpoints/Wan2.1-T2V-1.3B")
    return root


LAYOUTS = {
    "self-forcing": save_self_forcing,
    "longlive": save_longlive,
    "causvid": save_causvid,
    "rolling-forcing": save_rolling_forcing,
    "reward-forcing": save_reward_forcing,
    "wan-diffusers": save_diffusers,
}
