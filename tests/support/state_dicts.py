"""A transformer's tensors under the names, and in the folders, in which they are published; LoRAs for them."""

import json
import re

import torch
from safetensors.torch import save_file

LORA_MODULES = [f"{attn}.{name}" for attn in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
DIFFUSERS_RULES = """
  time_embedding.0>condition_embedder.time_embedder.linear_1 time_embedding.2>condition_embedder.time_embedder.linear_2
  text_embedding.0>condition_embedder.text_embedder.linear_1 text_embedding.2>condition_embedder.text_embedder.linear_2
  time_projection.1>condition_embedder.time_proj head.modulation>scale_shift_table head.head>proj_out
  modulation>scale_shift_table ffn.0>ffn.net.0.proj ffn.2>ffn.net.2 norm3>norm2 self_attn.>attn1. cross_attn.>attn2.
  attn1.q.>attn1.to_q. attn1.k.>attn1.to_k. attn1.v.>attn1.to_v. attn1.o.>attn1.to_out.0.
  attn2.q.>attn2.to_q. attn2.k.>attn2.to_k. attn2.v.>attn2.to_v. attn2.o.>attn2.to_out.0.
"""


def to_diffusers(state):
    """The renaming of diffusers' conversion script: replacements of parts of the key, one after the other."""
    renamed = {}
    for key, tensor in state.items():
        for rule in DIFFUSERS_RULES.split():
            key = key.replace(*rule.split(">"))
        renamed[key] = tensor
    return renamed


def prefixed(state, prefix, infix=""):
    """Keys with a prefix, and the infix in front of every block's insides."""
    return {prefix + re.sub(r"(blocks\.\d+\.)", rf"\1{infix}", key): tensor for key, tensor in state.items()}


def scrambled(state):
    return {key: tensor + 1 for key, tensor in state.items()}


def save_shards(state, folder, count=3):
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for shard in range(count):
        name, keys = f"diffusion_pytorch_model-{shard + 1:05}-of-{count:05}.safetensors", sorted(state)[shard::count]
        save_file({key: state[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    return weight_map


def save_wan_folder(state, folder):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    torch.save({"token_embedding.weight": torch.ones(2)}, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    config = {"_class_name": "WanModel", "model_type": "t2v", "dim": 256, "num_heads": 2, "text_len": 512, "eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_diffusers_folder(state, folder):
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = save_shards(to_diffusers(state), folder, count=2)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"num_attention_heads": 2, "attention_head_dim": 128, "in_channels": 16, "out_channels": None}
    config |= {"qk_norm": "rms_norm_across_heads", "patch_size": [1, 2, 2], "image_dim": None, "num_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_diffusers_root(state, root):
    save_diffusers_folder(state, root / "transformer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "x"], "transformer_2": [None, None]}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def low_rank(tiny, rank=4):
    """(A, B) by target module, of sizes that change the weights visibly."""
    generator = torch.Generator().manual_seed(0)
    modules = [f"blocks.{layer}.{name}" for layer in range(2) for name in LORA_MODULES]
    shapes = {module: tiny[f"{module}.weight"].shape for module in modules}
    draw = lambda *shape: torch.randn(shape, generator=generator) / 16
    return {module: (draw(rank, shape[1]), draw(shape[0], rank)) for module, shape in shapes.items()}


def peft(pairs, prefix="base_model.model.", names=("lora_A.weight", "lora_B.weight")):
    return {f"{prefix}{module}.{name}": pair[i] for module, pair in pairs.items() for i, name in enumerate(names)}


def kohya(pairs, alpha):
    named = peft(pairs, "", ("lora_down.weight", "lora_up.weight"))
    return named | {f"{module}.alpha": torch.tensor(alpha) for module in pairs}


def flattened(pairs, prefix="lora_unet_", alpha=None):
    """The names of kohya and musubi: dots of the module become underscores."""
    named = {}
    for module, (down, up) in pairs.items():
        flat = prefix + module.replace(".", "_")
        named |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        named |= {} if alpha is None else {f"{flat}.alpha": torch.tensor(alpha)}
    return named


def scaled_float8(state, chosen, *, rows=False, leaf="scale_weight"):
    """float8 with scales beside the chosen weights, as ComfyUI and LightX2V have them, and the exact product."""
    stored, exact = {}, {}
    for key, tensor in state.items():
        if not chosen(key, tensor):
            stored[key] = exact[key] = tensor
            continue
        largest = tensor.abs().amax(dim=1, keepdim=True) if rows else tensor.abs().max()
        scale = (largest / 448).float()
        stored[key] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[f"{key.removesuffix('.weight')}.{leaf}"] = scale
        exact[key] = stored[key].float() * scale
    return stored, exact
