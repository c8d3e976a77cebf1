"""Embeddings are kept without padding, written as they are made, and either whole or not there."""

import os
import resource
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flexkern.model.embeddings import KnownPrompts, SavedEmbeddings, embeddings_file, save_embeddings

TOKENS, WIDTH = 512, 64


def encode(prompts):
    """As many rows as the prompt has letters, padded to TOKENS."""
    made = torch.zeros(len(prompts), TOKENS, WIDTH, dtype=torch.bfloat16)
    for rows, prompt in zip(made, prompts, strict=True):
        rows[: len(prompt)] = torch.arange(1, len(prompt) + 1).view(-1, 1)
    return made


def test_known_prompts_are_kept_without_padding(tmp_path):
    prompts = [f"scene {number:04}" for number in range(500)]  # 32 MB padded, 0.6 MB without
    tracemalloc.start()
    save_embeddings(tmp_path / "e.safetensors", encode, prompts)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    known, saved = KnownPrompts.encoded(encode, prompts), SavedEmbeddings(tmp_path / "e.safetensors")
    held = sum(rows.untyped_storage().nbytes() for rows in known._rows.values())
    assert held == 500 * 10 * WIDTH * 2 and known.tokens == TOKENS
    for encoder in (known, saved):
        assert torch.equal(encoder(prompts[7:9]), encode(prompts[7:9]))
    assert (tmp_path / "e.safetensors").stat().st_size < held + 500 * 250


def test_the_file_is_plain_safetensors_and_knows_its_width(tmp_path):
    prompts = ["a", "“quoted” \n 猫 🐈", "b" * 900]
    file = tmp_path / "e.safetensors"
    save_embeddings(file, lambda prompts: encode([prompt[:TOKENS] for prompt in prompts]), prompts)
    with safe_open(file, framework="pt") as held:
        assert [list(held.get_slice(str(i)).get_shape()) for i in range(3)] == [[1, 64], [14, 64], [512, 64]]
    saved = SavedEmbeddings(file)
    assert saved.prompts == tuple(prompts) and saved.width() == saved.width(prompts) == WIDTH
    with pytest.raises(ValueError, match="holds no embedding of 'c'"):
        saved.width(["a", "c"])


def test_a_file_that_is_replaced_while_it_is_read_stays_readable(tmp_path):
    save_embeddings(tmp_path / "e.safetensors", encode, ["one"])
    saved = SavedEmbeddings(tmp_path / "e.safetensors")
    save_embeddings(tmp_path / "e.safetensors", encode, ["three"])
    assert torch.equal(saved(["one"]), encode(["one"]))
    assert SavedEmbeddings(tmp_path / "e.safetensors").prompts == ("three",)


class Broken(Exception):
    pass


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path):
    file = tmp_path / "e.safetensors"
    save_embeddings(file, encode, ["old"])
    for stop in (Broken, KeyboardInterrupt):
        seen = []

        def failing(prompts, stop=stop, seen=seen):
            if prompts == ["two"]:
                raise stop
            seen.append(sorted(path.name for path in tmp_path.iterdir()))
            return encode(prompts)

        with pytest.raises(stop):
            save_embeddings(file, failing, ["one", "two"])
        assert len(seen[0]) == 2 and "e.safetensors" in seen[0]  # the new one is being written
        assert SavedEmbeddings(file).prompts == ("old",) and len(list(tmp_path.iterdir())) == 1


def test_rows_reach_the_disk_as_they_are_made(tmp_path):
    with embeddings_file(tmp_path / "e.safetensors", ["one", "three"]) as add:
        sizes = [next(tmp_path.iterdir()).stat().st_size]
        for prompt in ("one", "three"):
            add(encode([prompt])[0, : len(prompt)], TOKENS)
            sizes.append(next(tmp_path.iterdir()).stat().st_size)
    assert [after - before for before, after in zip(sizes, sizes[1:], strict=False)] == [3 * 128, 5 * 128]
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]


@pytest.mark.parametrize("room", [100, 1000, 30_000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, room):
    prompts = [f"scene {number:04}" for number in range(100)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match=r"embeddings cannot be written to .*e.safetensors: File too large"):
            save_embeddings(tmp_path / "e.safetensors", encode, prompts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_shows_before_an_encoder_is_loaded(tmp_path):
    with (
        pytest.raises(OSError, match="embeddings cannot be written to .*none/e.safetensors: No such file or directory"),
        embeddings_file(tmp_path / "none/e.safetensors", ["one"]),
    ):
        pytest.fail("the encoder was loaded")


def test_a_link_keeps_pointing_to_the_file(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "e.safetensors").symlink_to("there/real.safetensors")
    save_embeddings(tmp_path / "e.safetensors", encode, ["one"])
    assert (tmp_path / "e.safetensors").is_symlink() and os.listdir(tmp_path / "there") == ["real.safetensors"]


def test_embeddings_that_are_not_finite_are_refused(tmp_path):
    nan = lambda prompts: encode(prompts) * float("nan")
    for way in (
        lambda: save_embeddings(tmp_path / "e.safetensors", nan, ["one"]),
        lambda: KnownPrompts.encoded(nan, ["one"]),
    ):
        with pytest.raises(ValueError, match="the text encoder's embedding of 'one' is not finite; its weights"):
            way()
    assert not list(tmp_path.iterdir())
    notes = {"prompts": '["one"]', "tokens": "512"}
    save_file({"0": torch.full((3, WIDTH), float("inf"))}, tmp_path / "e.safetensors", metadata=notes)
    with pytest.raises(ValueError, match="e.safetensors: the embedding of 'one' is not finite; encode it again"):
        SavedEmbeddings(tmp_path / "e.safetensors")(["one"])


DAMAGED = {
    "three dimensions": ({"0": torch.ones(1, 5, 8)}, {}, r"of 'a cat' must be .*, got F32 \[1, 5, 8\]"),
    "more rows than tokens": ({"0": torch.ones(10, 8)}, {}, r"got F32 \[10, 8\]; encode it again"),
    "integers": ({"0": torch.ones(5, 8, dtype=torch.int32)}, {}, "must be floating point .*, got I32"),
    "one that is not there": ({"0": torch.ones(5, 8)}, {"prompts": '["a cat", "a dog"]'}, "of 'a dog' .*, got nothing"),
    "no list": ({"0": torch.ones(5, 8)}, {"prompts": "["}, "its list of prompts is damaged; encode them again"),
    "no texts": ({"0": torch.ones(5, 8)}, {"prompts": "[3]"}, "its list of prompts is damaged"),
    "no number": ({"0": torch.ones(5, 8)}, {"tokens": "many"}, "its list of prompts is damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_file_whose_header_does_not_fit_is_refused_when_it_is_opened(tmp_path, case):
    """So that inspect does not promise it, and no render begins with it."""
    tensors, notes, words = DAMAGED[case]
    save_file(tensors, tmp_path / "e.safetensors", {"prompts": '["a cat"]', "tokens": "9", **notes})
    with pytest.raises(ValueError, match=f"e.safetensors: .*{words}"):
        SavedEmbeddings(tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match="is a folder; expected a file of save_embeddings"):
        SavedEmbeddings(tmp_path)
