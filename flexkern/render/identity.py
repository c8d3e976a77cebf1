"""What decides the bits of a render, besides its order: model, weights, versions, device.

The same on two machines, a video is the same. What of it differs is named before a render goes on elsewhere.
"""

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from flexkern import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from flexkern.engine import Engine

SAMPLES = 64  # groups of 8 bytes of a tensor that are hashed one by one, besides the sum of all
DEPTH = 3  # how far into a decoder its weights are looked for


def identity(engine: "Engine", prompts: Sequence[str], *, writes: str) -> dict[str, Any]:
    """What a render by this engine depends on, by name; fits JSON.

    Args:
        engine: What renders.
        prompts: What it is asked for; their embeddings count, not the text encoder.
        writes: "latents", or else pictures, to which decoder and encoder belong.

    Bytes: reads all weights once.
    """
    import numpy
    import torch

    device = engine.model.device
    found: dict[str, Any] = {
        "flexkern": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "backend": engine.backend_name,
        "dtype": str(engine.model.dtype),
        "device": device.type,
        "precision of float32": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"GPU": about.name, "multiprocessors": about.multi_processor_count, "CUDA": torch.version.cuda}
    else:
        found |= {"processor": platform.machine(), "vector instructions": torch.backends.cpu.get_cpu_capability()}
        found["threads"] = torch.get_num_threads()
    if device.type == "cuda" or engine.backend_name == "triton":  # whose sums depend on how rows and tiles are cut
        found["ranks"] = 1 if engine.ranks is None else engine.ranks.count
    if engine.backend_name not in ("sdpa", "reference"):
        found |= {name: told for name in ("triton", "flash-attn", "xformers") if (told := _installed(name))}
    if engine.backend_name == "triton":
        from flexkern.kernels.attention.select import selected

        chosen = selected(device, engine.model.config.head_dim, engine.model.dtype)
        found["attention kernel"] = f"{chosen.path}, {chosen.config or chosen.variant}"  # a tile that was found, too
    found["weights"] = fingerprint(_tensors(engine.model, DEPTH))
    embeddings = ((prompt, engine.embed(prompt)) for prompt in prompts)
    found["embeddings of the prompts"] = fingerprint(embeddings)
    if writes != "latents":
        decoder = None if engine.decoder is None else engine.decoder()
        found["decoder"] = f"{type(decoder).__name__} {fingerprint(_tensors(decoder, DEPTH))}"
        found["av"] = _installed("av")
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, in words, one each."""
    said = lambda values, name: repr(values[name]) if name in values else "nothing"
    names = dict.fromkeys((*before, *now))
    return [
        f"{name} was {said(before, name)}, is {said(now, name)}"
        for name in names
        if name not in before or name not in now or before[name] != now[name]
    ]


def fingerprint(tensors: "Iterator[tuple[str, Tensor]]") -> str:
    """16 hexadecimal digits that differ where a name, shape, dtype or value does.

    All bytes go into a sum, taken where the tensor is; samples, names and shapes into a hash.
    """
    import torch

    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content = tensor.detach().contiguous().flatten().view(torch.uint8)
        if content.storage_offset() % 8:
            content = content.clone()
        whole = len(content) // 8 * 8
        words = content[:whole].view(torch.int64)
        samples = words[:: max(1, len(words) // SAMPLES)]
        found.update(words.sum().cpu().numpy().tobytes())
        found.update(samples.cpu().numpy().tobytes() + content[whole:].cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def _tensors(thing: object, depth: int) -> "Iterator[tuple[str, Tensor]]":
    """Weights of modules, and tensors, that are attributes of a thing or of its attributes."""
    import torch

    if isinstance(thing, torch.nn.Module):
        yield from thing.state_dict().items()
    elif isinstance(thing, torch.Tensor):
        yield "", thing
    elif depth and hasattr(thing, "__dict__"):
        for name, value in sorted(vars(thing).items()):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _tensors(value, depth - 1))


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
