"""A model of the demo's form that has learned nothing, and renders in a moment."""

import json
from dataclasses import replace

import torch
from safetensors.torch import save_file

from flexkern.demo.train import CONFIG
from flexkern.model.wan import CausalWan


def save_tiny(path):
    """Write it, the same each time."""
    torch.manual_seed(0)
    config = replace(CONFIG, dim=64, ffn_dim=64, num_heads=1, num_layers=1, freq_dim=32)
    save_file(CausalWan(config).state_dict(), path, {"flexkern_config": json.dumps(config.to_dict())})
    return path
