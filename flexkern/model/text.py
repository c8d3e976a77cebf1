"""Prompts into the embeddings that Wan reads: the UMT5-XXL encoder, whichever layout its weights come in.

    encoder = load_text_encoder("Wan2.1-T2V-1.3B")  # or its models_t5_umt5-xxl-enc-bf16.pth, or a diffusers folder

Source: Wan-Video/Wan2.1 wan/modules/t5.py and tokenizers.py; diffusers pipelines/wan/pipeline_wan.py.
"""

import html
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexkern.model.embeddings import KnownPrompts, SavedEmbeddings, padded, save_embeddings, short, validate_prompts
from flexkern.model.files import find_files, read_tensor, some_of
from flexkern.model.intact import require_there, validate_no_pointer
from flexkern.model.load import declared, fill, fitting, need, read_part
from flexkern.model.quantized import SPIECE
from flexkern.model.spiece import tokenizer_of

__all__ = ["KnownPrompts", "SavedEmbeddings", "WanTextEncoder", "load_text_encoder", "save_embeddings"]

TOKENS = 512  # that every Wan 2.1 was trained with
FOLDER_FILES = ("models_t5*.pth", "model*.safetensors", "pytorch_model*.bin")
TOKENIZER_FOLDERS = ("google/umt5-xxl", "tokenizer", "../tokenizer", ".")  # as seen from the weights
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
_ATTENTION = "encoder.block.*.layer.0.SelfAttention"
_FEED_FORWARD = "encoder.block.*.layer.1.DenseReluDense"
WAN_NAMES = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "blocks.*.norm1": "encoder.block.*.layer.0.layer_norm",
    "blocks.*.norm2": "encoder.block.*.layer.1.layer_norm",
    **{f"blocks.*.attn.{name}": f"{_ATTENTION}.{name}" for name in "qkvo"},
    "blocks.*.pos_embedding.embedding": f"{_ATTENTION}.relative_attention_bias",
    "blocks.*.ffn.gate.0": f"{_FEED_FORWARD}.wi_0",
    "blocks.*.ffn.fc1": f"{_FEED_FORWARD}.wi_1",
    "blocks.*.ffn.fc2": f"{_FEED_FORWARD}.wo",
}
TIES = {"encoder.embed_tokens.weight": "shared.weight"}
UNSEEN = ("relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj")  # what no shape shows
PURPOSE = "the text encoder"


def clean_prompt(prompt: str) -> str:
    """The prompt as Wan's tokenizer sees it: mojibake and HTML entities undone, runs of white space one space."""
    text: str = need("ftfy", PURPOSE).fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


class WanTextEncoder:
    """The embeddings of prompts. An embedding does not depend on the prompts beside it.

    Numerics: rows after the prompt are not computed; padding is masked, so they change the others by rounding at most.
    """

    def __init__(self, module: nn.Module, tokenizer: Any, tokens: int = TOKENS):
        self.module, self.tokenizer, self.tokens = module, tokenizer, tokens

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[B, tokens, C] in the encoder's dtype, zero after each prompt. Warns where a prompt is cut off."""
        validate_prompts(prompts)
        return padded([self._embed(prompt) for prompt in prompts], self.tokens)

    @torch.no_grad()
    def _embed(self, prompt: str) -> Tensor:
        text = clean_prompt(prompt)
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > self.tokens:
            warnings.warn(f"prompt of {len(ids)} tokens is cut to {self.tokens}: {short(prompt)}", stacklevel=3)
            ids = self.tokenizer(text, truncation=True, max_length=self.tokens)["input_ids"]
        device = next(self.module.parameters()).device
        rows: Tensor = self.module(input_ids=torch.tensor([ids], device=device)).last_hidden_state[0]
        return rows


def load_text_encoder(
    path: str | Path, *, tokenizer: str | Path | None = None, device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> WanTextEncoder:  # fmt: skip
    """The encoder of a checkpoint: callable with a list of prompts, gives [B, 512, 4096], zero after each prompt.

    Bytes: 11.4 GB in bfloat16; on the CPU, in the file's own dtype, they stay mapped to the file.

    Args:
        path: models_t5_umt5-xxl-enc-bf16.pth, a transformers weight file, ComfyUI's umt5_xxl files (float8 as well),
            the folder of any, or a diffusers folder.
        tokenizer: Its folder or tokenizer.json; default: the one inside the file, else google/umt5-xxl or tokenizer
            beside the weights.
        device: Where it runs.
        dtype: bfloat16 or float32; T5 overflows in float16.

    Raises:
        FileNotFoundError: No weights or no tokenizer is there.
        ImportError: Names the extra that has transformers and ftfy.
        ValueError: Lists the keys that do not fit; or the dtype is another.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be bfloat16 or float32, in which T5 does not overflow, got {dtype}")
    make, state, words = _read(Path(path), tokenizer, headers=False)
    return WanTextEncoder(fill(make, state, str(path), dtype=dtype, device=device, ties=TIES), words)


def validate_text_encoder(path: str | Path, *, tokenizer: str | Path | None = None) -> int:
    """The channels of its embeddings, told from names and shapes. Raises what ``load_text_encoder`` would."""
    make, state, _ = _read(Path(path), tokenizer, headers=True)
    width: int = fitting(make, state, str(path), ties=TIES).config.d_model
    return width


def _read(path: Path, tokenizer: str | Path | None, *, headers: bool) -> tuple[Any, dict[str, Tensor], Any]:
    """What builds the module, its tensors under the names of transformers, and the tokenizer."""
    files = find_files(path, "text_encoder", FOLDER_FILES)
    transformers = need("transformers", PURPOSE)
    need("ftfy", PURPOSE)
    state = _transformers_names(read_part(files, headers=headers))
    inside = state.pop(SPIECE, None)
    config = transformers.UMT5Config(**_sizes(state, path), **_unseen(files))
    if tokenizer is None and inside is not None:
        where = path
        words = tokenizer_of(_bytes_of(files, inside), transformers)
    else:
        where = _find_tokenizer(files[0].parent if tokenizer is None else Path(tokenizer), given=tokenizer is not None)
        words = _read_tokenizer(where, transformers)
    if len(words) > config.vocab_size:
        raise ValueError(f"the tokenizer in {where} has {len(words)} tokens, {path} embeds {config.vocab_size}")
    return lambda: transformers.UMT5EncoderModel(config), state, words


def _read_tokenizer(folder: Path, transformers: Any) -> Any:
    """The tokenizer of a folder. Raises ValueError that names the folder where it cannot be read."""
    for file in (folder / name for name in TOKENIZER_FILES):
        if file.is_file():
            with file.open("rb") as stream:
                validate_no_pointer(file, stream.read(512), "the tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except ImportError:
        raise
    except Exception as error:  # what is in the folder may make transformers raise anything
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}; get it again") from error


def _bytes_of(files: list[Path], inside: Tensor) -> bytes:
    """The bytes of a tensor, which is read where only its header was."""
    if inside.is_meta:
        inside = next(held for file in files if (held := read_tensor(file, SPIECE)) is not None)
    return bytes(inside.contiguous().view(torch.uint8).numpy())


def _find_tokenizer(base: Path, *, given: bool) -> Path:
    if given and base.name in TOKENIZER_FILES and base.is_file():
        return base.parent
    if given:
        require_there(base, "tokenizer")
    tried = [base] if given else [base / name for name in TOKENIZER_FOLDERS]
    for folder in tried:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    looked = " | ".join(TOKENIZER_FILES)
    raise FileNotFoundError(f"no tokenizer ({looked}) in {', '.join(map(str, tried))}; pass its folder as tokenizer")


def _transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wan's names replaced by those of transformers; a name that the table lacks comes back as it is."""
    renamed = {}
    for key, tensor in state.items():
        block = re.match(r"blocks\.(\d+)\.", key)
        module, _, leaf = (f"blocks.*.{key[block.end() :]}" if block else key).rpartition(".")
        found = f"{WAN_NAMES[module]}.{leaf}" if module in WAN_NAMES else key
        renamed[found.replace("*", block[1]) if block else found] = tensor
    for name, of in TIES.items():  # transformers writes either or both
        if (tied := renamed.pop(name, None)) is not None:
            renamed.setdefault(of, tied)
    return renamed


def _sizes(state: Mapping[str, Tensor], path: Path) -> dict[str, int]:
    """The sizes that the shapes show; the heads are those of the position bias."""
    attention, feed_forward = _ATTENTION.replace("*", "0"), _FEED_FORWARD.replace("*", "0")
    keys = ["shared.weight", f"{attention}.q.weight", f"{attention}.relative_attention_bias.weight"]
    keys.append(f"{feed_forward}.wi_0.weight")
    shapes = [tuple(state[key].shape) for key in keys if key in state]
    if len(shapes) < 4 or any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"{path} is no UMT5 encoder: it lacks some of {', '.join(keys)}; it holds {some_of(state)}")
    (vocabulary, dim), (inner, _), (buckets, heads), (hidden, _) = shapes
    layers = {int(match[1]) for key in state if (match := re.match(r"encoder\.block\.(\d+)\.", key))}
    return {
        "vocab_size": vocabulary, "d_model": dim, "d_kv": inner // heads, "num_heads": heads, "d_ff": hidden,
        "num_layers": max(layers) + 1, "relative_attention_num_buckets": buckets,
    }  # fmt: skip


def _unseen(files: list[Path]) -> dict[str, Any]:
    """What no shape shows, from a config.json of the encoder's own."""
    found = declared(files)
    return {name: found[name] for name in UNSEEN if name in found} if found.get("model_type") == "umt5" else {}
