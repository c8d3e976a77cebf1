"""Checkpoints: a safetensors file whose every byte is checked, written whole or not at all, beside the render."""

import os
import random
import threading

import pytest
import torch
from safetensors import safe_open

from flexkern.render.checkpoint import Checkpoints, Damaged, is_out_of_memory, read_checkpoint, write_checkpoint
from flexkern.render.parts import Parts, checkpoints, made_at

STATE = {
    "half": torch.arange(7).to(torch.bfloat16), "bytes": torch.arange(5, dtype=torch.uint8),
    "long": torch.tensor([[1], [-(2**40)]]), "none": torch.zeros(0, 3), "flag": torch.tensor([True, False, True]),
    "strided": torch.arange(12.0).view(3, 4).t(), "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "name": "ü\n", "frames": [1, 2], "nothing": None, "record": {"id": "a", "history": [{"picture": 3}]},
}  # fmt: skip


def same(got, expected):
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert got[name].dtype == value.dtype and got[name].shape == value.shape
            assert torch.equal(got[name].float(), value.float()), name
        else:
            assert got[name] == value
    return got.keys() == expected.keys()


def test_a_state_comes_back_as_it_was(tmp_path):
    write_checkpoint(tmp_path / "c.safetensors", STATE)
    assert same(read_checkpoint(tmp_path / "c.safetensors"), STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:  # anybody can read it
        assert torch.equal(file.get_tensor("strided"), STATE["strided"])


def test_every_byte_that_changes_is_noticed(tmp_path):
    """One bit of each region: the header's length, its text, each tensor, the checksum; and 200 bits anywhere."""
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, STATE)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    regions = [range(8), range(8, 8 + header), range(8 + header, len(whole) - 32), range(len(whole) - 32, len(whole))]
    chance = random.Random(0)
    spots = [chance.choice(region) for region in regions for _ in range(40)] + list(regions[2]) + list(regions[0])
    for spot in spots:
        content = bytearray(whole)
        content[spot] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        with pytest.raises(Damaged, match="c.safetensors is damaged: its checksum"):
            read_checkpoint(path)
    for length in (0, 1, 32, 33, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            read_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(Damaged):
        read_checkpoint(path)


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("flexkern.render.checkpoint.FORMAT", 2)
    write_checkpoint(tmp_path / "c.safetensors", {"x": 1})
    monkeypatch.undo()
    with pytest.raises(Damaged, match="c.safetensors is of format 2, expected 1"):
        read_checkpoint(tmp_path / "c.safetensors")


def test_a_full_disk_leaves_nothing_of_it_and_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, {"x": 1})

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, STATE)
    assert read_checkpoint(path) == {"x": 1} and [entry.name for entry in tmp_path.iterdir()] == ["c.safetensors"]


def begin(tmp_path, **options):
    told = []
    parts = Parts(tmp_path / "v.mp4")
    return parts, Checkpoints(parts, tell=told.append, **options), told


def test_two_are_kept_and_the_newest_first(tmp_path):
    parts, kept, told = begin(tmp_path, every=0)
    (parts.folder / "checkpoint-000000001.safetensors.unfinished").write_bytes(b"of a process that was killed")
    for pictures in (9, 21, 33, 100):
        kept.take(pictures, lambda pictures=pictures: {"made": pictures})
    kept.wait()
    paths = checkpoints(parts.folder)
    assert [made_at(path) for path in paths] == [100, 33] and kept.pictures == 100 and not told
    assert read_checkpoint(paths[1]) == {"made": 33}
    assert sorted(path.name for path in parts.folder.iterdir())[2:] == ["lock"]


def test_a_render_waits_for_the_copy_alone(tmp_path, monkeypatch):
    """While one is written the next is not even copied."""
    parts, kept, _ = begin(tmp_path, every=1e-9)
    written, held, copied = threading.Event(), threading.Event(), []

    def slow(path, state):
        held.wait(10)
        written.set()

    monkeypatch.setattr("flexkern.render.checkpoint.write_checkpoint", slow)
    for pictures in (3, 6):
        kept.take(pictures, lambda pictures=pictures: copied.append(pictures) or {})
    assert copied == [3] and not written.is_set()
    held.set()
    kept.wait()
    assert written.is_set()


def test_copies_take_a_hundredth_of_the_time_at_most(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flexkern.render.checkpoint.time.monotonic", lambda: now[0])
    _, kept, _ = begin(tmp_path, every=30.0)

    def copied():
        now[0] += 2.0
        return {}

    taken = []
    for chunk in range(1000):
        before = kept.copying
        kept.take(chunk, copied)
        kept.wait()
        if kept.copying > before:
            taken.append(now[0] - 2.0)
        now[0] += 1.0
    assert taken[0] == 30.0 and kept.copying <= 0.01 * now[0] + 2.0
    assert [round(b - a) for a, b in zip(taken, taken[1:], strict=False)] == [202] * (len(taken) - 1) != []


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no")])
def test_a_state_that_cannot_be_copied_is_told_once(tmp_path, error):
    _, kept, told = begin(tmp_path, every=0)

    def copied():
        raise error

    if not is_out_of_memory(error):
        with pytest.raises(RuntimeError, match="no"):
            kept.take(1, copied)
        return
    for pictures in (1, 2):
        kept.take(pictures, copied)
    assert len(told) == 1 and "no checkpoint could be written: there is not enough memory" in told[0]


def test_a_checkpoint_that_has_no_room_is_told_and_the_render_goes_on(tmp_path, monkeypatch):
    parts, kept, told = begin(tmp_path, every=0)

    def full(path, state):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("flexkern.render.checkpoint.write_checkpoint", full)
    for pictures in (3, 6):
        kept.take(pictures, dict)
    kept.wait()
    assert len(told) == 1 and "No space left on device" in told[0] and "the render goes on without" in told[0]
    assert kept.pictures == 0 and not checkpoints(parts.folder)


def test_memory_of_the_machine_counts_too():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value) and not is_out_of_memory(RuntimeError("shapes differ"))
