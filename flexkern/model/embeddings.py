"""Embeddings of prompts without their padding: written to a file as they are made, read from it, or kept in memory.

    save_embeddings("prompts.safetensors", encoder, ["a cat walks on grass"])  # once, on whatever machine has 11 GB
    encoder = SavedEmbeddings("prompts.safetensors")  # the same embeddings, without the encoder

A prompt's rows end where it does, at 8 KB each in bfloat16; the 512 rows that Wan reads are made of them on use.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexkern.checks import require
from flexkern.finite import all_finite
from flexkern.model.files import DTYPES, some_of
from flexkern.model.intact import require_there, validate_form

NAMES = {dtype: name for name, dtype in DTYPES.items()}
PER_PROMPT = 160  # bytes that the header holds of a prompt, beside its text


def validate_prompts(prompts: Sequence[str]) -> None:
    """Raises ValueError for what is no list of texts."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")


def short(prompt: str) -> str:
    """A prompt in a message."""
    return repr(prompt if len(prompt) <= 80 else f"{prompt[:76]} ...")


def encoded_rows(encoder: Callable[[list[str]], Tensor], prompt: str) -> tuple[Tensor, int]:
    """A prompt's rows [used, C] on the CPU, and to how many the encoder padded them.

    Raises:
        ValueError: They are not finite.
    """
    embedding = encoder([prompt])[0]
    if not all_finite(embedding):
        advice = "its weights are damaged or lost too many bits: try those in bfloat16"
        raise ValueError(f"the text encoder's embedding of {short(prompt)} is not finite; {advice}")
    used = embedding.ne(0).any(dim=-1).nonzero()
    return embedding[: int(used.max()) + 1 if len(used) else 0].cpu().clone(), embedding.shape[0]


def padded(rows: Sequence[Tensor], tokens: int) -> Tensor:
    """[B, tokens, C] of the prompts' rows, zero after each."""
    made = rows[0].new_zeros(len(rows), tokens, rows[0].shape[-1])
    for whole, used in zip(made, rows, strict=True):
        whole[: len(used)] = used
    return made


class KnownPrompts:
    """A text encoder for prompts that were encoded before, and no others.

    Bytes: the rows of each prompt, 8 KB each, without padding.

    Args:
        rows: [used, C] by prompt, to the letter.
        tokens: How many rows an embedding has with its padding.
    """

    def __init__(self, rows: Mapping[str, Tensor], tokens: int):
        self._rows, self.tokens = dict(rows), tokens

    @classmethod
    def encoded(cls, encoder: Callable[[list[str]], Tensor], prompts: Iterable[str]) -> "KnownPrompts":
        """Those that the encoder makes, one prompt at a time. Raises ValueError where they are not finite."""
        rows, tokens = dict[str, Tensor](), 0
        for prompt in prompts:
            rows[prompt], tokens = encoded_rows(encoder, prompt)
        return cls(rows, tokens)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[B, tokens, C]. Raises ValueError for a prompt that was not encoded before."""
        validate_prompts(prompts)
        if unknown := [prompt for prompt in prompts if prompt not in self._rows]:
            known = some_of(map(short, self._rows))
            raise ValueError(f"{short(unknown[0])} was not encoded before the model was loaded; known are {known}")
        return padded([self._rows[prompt] for prompt in prompts], self.tokens)


class SavedEmbeddings:
    """A text encoder for the prompts of a file that ``save_embeddings`` wrote, and no others.

    Bytes: none; the file is mapped, and rows are read when they are asked for.

    prompts: what it knows, to the letter. Raises FileNotFoundError, or ValueError for another file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        require_there(self.path, "embeddings")
        require(not self.path.is_dir(), f"{self.path} is a folder; expected a file of save_embeddings")
        validate_form(self.path)
        try:
            self._file = safe_open(self.path, framework="pt").__enter__()
        except SafetensorError as error:
            raise ValueError(f"{self.path} is not a readable safetensors file: {error}") from error
        notes = self._file.metadata() or {}
        if not notes.keys() >= {"prompts", "tokens"}:
            raise ValueError(f"{self.path} does not say which prompts it holds; expected a file of save_embeddings")
        self.prompts, self.tokens = self._said(notes)
        self._index = {prompt: str(index) for index, prompt in enumerate(self.prompts)}

    def _said(self, notes: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
        """Prompts and tokens, told from the header alone. Raises ValueError where its tensors are not what it says."""
        try:
            prompts, tokens = json.loads(notes["prompts"]), int(notes["tokens"])
            fine = isinstance(prompts, list) and bool(prompts) and all(isinstance(one, str) for one in prompts)
        except (ValueError, RecursionError):
            fine = False
        require(fine, f"{self.path}: its list of prompts is damaged; encode them again")
        for index, prompt in enumerate(prompts):
            there = str(index) in self._file.keys()  # noqa: SIM118
            rows = self._file.get_slice(str(index)) if there else None
            shape, dtype = ([], "") if rows is None else (rows.get_shape(), rows.get_dtype())
            floating = dtype in DTYPES and DTYPES[dtype].is_floating_point
            fits = len(shape) == 2 and shape[0] <= tokens and shape[1] >= 1 and floating
            got = f"{dtype} {shape}" if there else "nothing"
            told = f"must be floating point [at most {tokens} rows, channels], got {got}"
            require(fits, f"{self.path}: the embedding of {short(prompt)} {told}; encode it again")
        return tuple(prompts), tokens

    def width(self, prompts: Sequence[str] = ()) -> int:
        """The channels C of its embeddings, told from the header. Raises ValueError for a prompt that is not in it."""
        self._validate(prompts or self.prompts[:1])
        width: int = self._file.get_slice(self._index[(prompts or self.prompts)[0]]).get_shape()[-1]
        return width

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[B, tokens, C] as the encoder gave them.

        Raises:
            ValueError: A prompt is not in the file, or its rows are not finite.
        """
        self._validate(prompts)
        rows = [self._file.get_tensor(self._index[prompt]) for prompt in prompts]
        for prompt, used in zip(prompts, rows, strict=True):
            if not all_finite(used):
                raise ValueError(f"{self.path}: the embedding of {short(prompt)} is not finite; encode it again")
        return padded(rows, self.tokens)

    def _validate(self, prompts: Sequence[str]) -> None:
        validate_prompts(prompts)
        if unknown := [prompt for prompt in prompts if prompt not in self._index]:
            known = some_of(map(short, self.prompts))
            raise ValueError(f"{self.path} holds no embedding of {short(unknown[0])}; it holds {known}")


def save_embeddings(path: str | Path, encoder: Callable[[list[str]], Tensor], prompts: Iterable[str]) -> None:
    """Write prompts and their embeddings to a safetensors file for ``SavedEmbeddings``; an existing one is replaced.

    The file appears under its name when it is whole; what is there stays until then.

    Bytes: the rows up to each prompt's end, 8 KB each in bfloat16; one prompt's at a time in memory.

    Args:
        path: The file to write.
        encoder: Gives [B, tokens, C], zero after each prompt.
        prompts: Those to write; one that comes twice is written once.

    Raises:
        OSError: It cannot be written; nothing of it stays.
        ValueError: An embedding is not finite.
    """
    wanted = [prompts] if isinstance(prompts, str) else list(dict.fromkeys(prompts))
    validate_prompts(wanted)
    with embeddings_file(path, wanted) as add:
        for prompt in wanted:
            add(*encoded_rows(encoder, prompt))


@contextmanager
def embeddings_file(path: str | Path, prompts: Sequence[str]) -> Iterator[Callable[[Tensor, int], None]]:
    """A file of the embeddings of these prompts, which gets its name when the context is left without an error.

    Its room is taken at once, so that a place that cannot be written to shows before an encoder is loaded.

    Yields:
        What writes the rows [used, C] of the next prompt, and how many they are with padding.

    Raises:
        OSError: Names the file and what is wrong; nothing of it stays.
    """
    path = Path(os.path.realpath(path))  # a link keeps pointing to the file
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    texts = json.dumps(list(prompts))
    room = len(json.dumps(texts)) + PER_PROMPT * (1 + len(prompts))
    room += -room % 8
    header: dict[str, Any] = {"__metadata__": {"prompts": texts}}
    end, count = 0, 0
    try:
        with _naming(path), part.open("wb") as file:
            file.write(struct.pack("<Q", room) + b" " * room)
            file.flush()

        def add(rows: Tensor, tokens: int) -> None:
            nonlocal end, count
            data = rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            header[str(count)] = {
                "dtype": NAMES[rows.dtype],
                "shape": list(rows.shape),
                "data_offsets": [end, end + len(data)],
            }
            header["__metadata__"]["tokens"] = str(tokens)
            end, count = end + len(data), count + 1
            with _naming(path), part.open("ab") as file:
                file.write(data)

        yield add
        with _naming(path), part.open("r+b") as whole:
            whole.seek(8)
            whole.write(json.dumps(header).encode().ljust(room))
            whole.flush()
            os.fsync(whole.fileno())
        with _naming(path):
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the system name the file that was to be written."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"embeddings cannot be written to {path}: {error.strerror or error}") from error
