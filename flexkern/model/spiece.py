"""A SentencePiece model as a tokenizer, read without the package: ComfyUI's UMT5 files hold one as a tensor of bytes.

Source: google/sentencepiece src/sentencepiece_model.proto for the fields; transformers convert_slow_tokenizer.py
(SpmConverter, T5Converter) for how a Unigram model of T5 normalises, splits and ends.
"""

import struct
from collections.abc import Iterator
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER, _UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces
UNIGRAM = 1  # kind of model
SPACE = "▁"


def tokenizer_of(model: bytes, transformers: Any) -> Any:
    """transformers' fast tokenizer of a serialized SentencePiece model.

    Raises:
        ValueError: The bytes are no SentencePiece model.
        NotImplementedError: It is not of the Unigram kind.
    """
    import tokenizers

    try:
        pieces, trainer, normalizer = _parse(model)
    except (IndexError, struct.error, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"spiece_model is no SentencePiece model ({error})") from None
    kinds = [kind for _, _, kind in pieces]
    if not pieces or UNKNOWN not in kinds:
        raise ValueError(f"spiece_model is no SentencePiece model: it has {len(pieces)} pieces, none for unknown text")
    if trainer.get(3, UNIGRAM) != UNIGRAM:
        raise NotImplementedError(f"spiece_model is of kind {trainer[3]}; supported: Unigram (1), as UMT5's is")
    vocabulary = [(piece, score) for piece, score, _ in pieces]
    model_ = tokenizers.models.Unigram(vocabulary, unk_id=kinds.index(UNKNOWN), byte_fallback=BYTE in kinds)
    inner = tokenizers.Tokenizer(model_)
    inner.normalizer = _normalizer(normalizer, tokenizers)
    scheme = "always" if normalizer.get(3, 1) else "never"
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    inner.decoder = tokenizers.decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    words = [piece for piece, _, _ in pieces]
    special = {"unk_token": words[kinds.index(UNKNOWN)], "eos_token": "</s>", "pad_token": "<pad>"}
    for name in ("eos_token", "pad_token"):
        if special[name] not in words:
            raise ValueError(f"spiece_model has no piece {special[name]}, which UMT5 reads")
    added = [words[index] for index, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN)]
    inner.add_special_tokens([tokenizers.AddedToken(word, special=True, normalized=False) for word in added])
    users = [words[index] for index, kind in enumerate(kinds) if kind == USER]
    inner.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in users])
    end = ("</s>", words.index("</s>"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[end]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def _normalizer(spec: dict[int, Any], tokenizers: Any) -> Any:
    """The model's own table of replacements, then runs of spaces as one and none at the ends, if the model says so."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(spec[2])] if spec.get(2) else []
    if spec.get(4, 1):
        steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), SPACE)]
    return tokenizers.normalizers.Sequence(steps)


def _parse(model: bytes) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    """Text, score and kind of every piece; the fields of the trainer and of the normalizer by number."""
    pieces: list[tuple[str, float, int]] = []
    trainer, normalizer = dict[int, Any](), dict[int, Any]()
    for number, value in _fields(model):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            pieces.append((piece.get(1, b"").decode(), score, piece.get(3, NORMAL)))
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_fields(value))
    return pieces, trainer, normalizer


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a protobuf message: an integer, or the bytes of anything else."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire not in (1, 2, 5):
            raise IndexError(f"wire type {wire} at byte {at}")
        size, at = _varint(message, at) if wire == 2 else (8 if wire == 1 else 4, at)
        if at + size > len(message):
            raise IndexError(f"the end is missing at byte {at}")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The integer at a byte, and the byte after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
