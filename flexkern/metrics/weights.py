"""Metrics that need weights: the user hands in a model, nothing is ever downloaded.

An embedder turns pictures uint8 [N, H, W, 3] into features [N, D] (DINO for the subject, CLIP for the background), a
scorer into one figure each, [N] (MUSIQ for imaging quality, an aesthetic predictor, ...).
"""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Model = Callable[[NDArray[np.uint8]], NDArray[Any]]

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
BATCH = 16  # pictures


class Consistency:
    """How alike pictures are to the first one and to the one before, by features; feed it batches in order.

        c_t = (max(0, cos(f_0, f_t)) + max(0, cos(f_(t-1), f_t))) / 2

    In 0..1, higher is steadier; a frozen video has 1. NaN for the first picture.

    Source: subject consistency (DINO) and background consistency (CLIP) of VBench (arXiv 2311.17982).
    """

    def __init__(self, embed: Model):
        """embed: pictures uint8 [N, H, W, 3] to features [N, D]."""
        self.embed = embed
        self._first: NDArray[np.float64] | None = None
        self._before: NDArray[np.float64] | None = None

    def __call__(self, pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Return c of the pictures, float64 [N]. Raises ValueError where the features are not [N, D]."""
        features = np.asarray(self.embed(pictures), dtype=np.float64)
        if features.ndim != 2 or len(features) != len(pictures):
            raise ValueError(f"an embedder must return [{len(pictures)}, D], got {list(features.shape)}")
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        result = np.full(len(features), np.nan)
        for number, feature in enumerate(features):
            if self._first is None or self._before is None:
                self._first = feature
            else:
                result[number] = (max(0.0, feature @ self._first) + max(0.0, feature @ self._before)) / 2
            self._before = feature
        return result


class Score:
    """One figure per picture by a model of the user's, such as MUSIQ; unit and scale are the model's own.

    Source: imaging quality (MUSIQ) and aesthetic quality of VBench (arXiv 2311.17982) are scores of this kind.
    """

    def __init__(self, score: Model):
        """score: pictures uint8 [N, H, W, 3] to [N] or [N, 1]; higher is taken to be better."""
        self.score = score

    def __call__(self, pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Return the figures, float64 [N]. Raises ValueError where the model returns another number of them."""
        scores = np.asarray(self.score(pictures), dtype=np.float64)
        if scores.size != len(pictures):
            raise ValueError(f"a scorer must return [{len(pictures)}], got {list(scores.shape)}")
        return scores.reshape(-1)


def load_model(where: str) -> Model:
    """Return a model from where the user has it.

    Args:
        where: a folder of transformers with an image model (DINO, DINOv2, CLIP; it becomes an embedder), or
            ``module:name`` of a callable (pictures uint8 [N, H, W, 3] to [N, D] or [N]).

    Raises:
        ValueError: it is neither, or there is no such module or name.
    """
    if Path(where).is_dir():
        return load_embedder(Path(where))
    module, colon, name = where.partition(":")
    if not colon or not name:
        raise ValueError(f"{where} is neither a folder of transformers nor module:name of a callable")
    try:
        found = getattr(import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"no callable {where}: {error}") from error
    if not callable(found):
        raise ValueError(f"{where} must be callable, got {type(found).__name__}")
    return found


def load_embedder(folder: Path) -> Model:
    """Return an embedder from a local folder of transformers: projected features of CLIP, else the class token.

    Pictures are resized so that the shorter side fits, cropped to the middle and normalised as preprocessor_config.json
    says (224 pixels and ImageNet's mean and deviation where it says nothing). Runs where there is a GPU, on it.
    """
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    file = folder / "preprocessor_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    side = _side(config.get("crop_size", config.get("size", 224)))
    mean, deviation = (
        config.get(name, value) for name, value in zip(("image_mean", "image_std"), IMAGENET, strict=True)
    )

    @torch.inference_mode()
    def embed(pictures: NDArray[np.uint8]) -> NDArray[Any]:
        pixels = torch.from_numpy(np.ascontiguousarray(pictures)).to(device).movedim(-1, 1).float() / 255
        pixels = _fit(pixels, side)
        pixels = (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(deviation)[:, None, None]
        if hasattr(model, "get_image_features"):
            features = model.get_image_features(pixel_values=pixels)
            features = features if isinstance(features, torch.Tensor) else features.pooler_output
        else:
            features = model(pixel_values=pixels).last_hidden_state[:, 0]
        return features.float().cpu().numpy()

    return embed


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size.get("height", size.get("shortest_edge", 224)))


def _fit(pixels: Any, side: int) -> Any:
    """Resize pixels [N, 3, H, W] so that the shorter side has ``side`` pixels, and keep the middle square."""
    from torch.nn import functional as F

    height, width = pixels.shape[-2:]
    ratio = side / min(height, width)
    size = max(side, round(height * ratio)), max(side, round(width * ratio))
    pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return pixels[..., top : top + side, left : left + side]
