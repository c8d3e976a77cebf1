"""Files that have taken the place of weights are told by what they are, with how to get the weights."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexkern.model.find import find_part, find_parts, holdings, identify
from flexkern.model.intact import validate_form
from flexkern.model.weights import load_transformer

FILE = Path(__file__).parent.parent / "data" / "tiny_wan.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5676070424\n"
STRANGE = {  # what the file holds: what is said
    POINTER: "is a Git LFS pointer for a file of 5,676,070,424 bytes, not the weights; .* `git lfs pull`",
    b"\n <!DOCTYPE html><html>": "is a web page .HTML., not weights; .*/resolve/ in place of /blob/",
    b'<?xml version="1.0"?><Error>': "is a web page .HTML., not weights",
    b"Entry not found": "is a text of 15 bytes that begins 'Entry not found', not weights",
    b'{"error":"Invalid username"}': 'is a text of 28 bytes that begins \'."error":"Inval',
    b"": "is empty; download it again",
    b"GGUF\x03\x00\x00\x00": "is quantised as GGUF; supported: safetensors and torch's files",
    b"\x89HDF\r\n\x1a\n": "is a file of another framework",
    bytes(64): "is neither a safetensors file nor torch's: it begins with the bytes 00 00 00 00",
}


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights"])
@pytest.mark.parametrize("content", STRANGE)
def test_what_is_no_weight_file_is_told_by_what_it_is(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    for way in (validate_form, load_transformer):
        with pytest.raises((ValueError, NotImplementedError), match=f"{name} {STRANGE[content]}"):
            way(tmp_path / name)


def test_what_is_no_file_and_no_folder_is_refused():
    for way in (find_parts, holdings, load_transformer):
        with pytest.raises(ValueError, match="/dev/null is neither a file nor a folder"):
            way("/dev/null")


def test_a_pipe_in_the_folder_is_left_alone(tmp_path):
    """Who opens one waits until somebody writes; here somebody has, so that a look at it would be told."""
    shutil.copy(FILE, tmp_path / "w.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "link.pt").symlink_to("pipe.safetensors")
    opened = os.open(tmp_path / "pipe.safetensors", os.O_RDWR | os.O_NONBLOCK)
    os.write(opened, b"x" * 8192)
    try:
        assert find_parts(tmp_path).unread == find_parts(tmp_path / "w.safetensors").unread == ()
    finally:
        os.close(opened)


def test_a_download_that_has_not_finished(tmp_path):
    (tmp_path / "w.safetensors.incomplete").write_bytes(FILE.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is a download that has not finished"):
        load_transformer(tmp_path / "w.safetensors.incomplete")


@pytest.mark.parametrize("left", [9, 4000, 400_000, -1])
def test_a_cut_safetensors_file_says_how_much_is_missing(tmp_path, left):
    whole = FILE.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:left])
    missing = len(whole) - len(whole[:left])
    header = 8 + int.from_bytes(whole[:8], "little")
    exact = (
        f"is cut off: {missing:,} of {len(whole):,} bytes" if len(whole) - missing >= header else "at least .* bytes"
    )
    with pytest.raises(ValueError, match=f"{exact} are missing; download it again"):
        load_transformer(tmp_path / "cut.safetensors")


def test_a_cut_zip_file_says_how_much_at_least(tmp_path):
    torch.save({"generator": load_file(FILE), "half": torch.ones(1000).half()}, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    tensors = sum(t.nbytes for t in load_file(FILE).values()) + 2000
    for left in (300_000, len(whole) // 2):
        (tmp_path / "w.pt").write_bytes(whole[:left])
        with pytest.raises(ValueError, match=f"w.pt is cut off: at least {tensors - left:,} bytes are missing"):
            load_transformer(tmp_path / "w.pt")


@pytest.mark.parametrize("first", [0x80, 0x50, 0x3C, 0x7B])
@pytest.mark.parametrize("second", [0x02, 0x4B])
def test_the_length_of_a_header_may_look_like_another_format(tmp_path, first, second):
    """\\x80\\x02 begins a pickle, PK a zip, < a page, { an error in JSON."""
    content = FILE.read_bytes()
    length = int.from_bytes(content[:8], "little")
    wanted = first + 256 * second + 65536
    padded = wanted.to_bytes(8, "little") + content[8 : 8 + length].ljust(wanted) + content[8 + length :]
    (tmp_path / "w.safetensors").write_bytes(padded)
    assert validate_form(tmp_path / "w.safetensors") == "safetensors"
    assert load_transformer(tmp_path / "w.safetensors").config.num_layers == 2


class Unwelcome:
    def __reduce__(self):
        return Path.mkdir, (Path(self.folder),)


def test_looking_for_what_is_missing_runs_nothing(tmp_path):
    Unwelcome.folder = str(tmp_path / "made")
    torch.save({"x": Unwelcome(), "y": torch.ones(100_000)}, tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:50_000])
    with pytest.raises(ValueError, match="is cut off: at least 35"):
        validate_form(tmp_path / "w.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"x": Unwelcome()}, protocol=2))
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        load_transformer(tmp_path / "old.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("way", [find_parts, load_transformer, lambda path: find_part(path, ("VAE",))])
def test_a_name_on_the_hub_gets_the_command_that_downloads_it(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    told = {
        "gdhe17/Self-Forcing": "hf download gdhe17/Self-Forcing --local-dir Self-Forcing$",
        "https://huggingface.co/Wan-AI/Wan2.1": "hf download Wan-AI/Wan2.1 --local-dir Wan2.1$",
        "https://huggingface.co/a/b/blob/main/split/w.pth": "hf download a/b split/w.pth --local-dir b$",
    }
    for name, command in told.items():
        for path in (name, Path(name)):
            with pytest.raises(FileNotFoundError, match=command):
                way(path)
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/typo", "nowhere/w.safetensors", "nowhere", "/a/b", "../a/b", "a/b/c"):
        with pytest.raises(FileNotFoundError) as caught:
            way(name)
        assert "hf download" not in str(caught.value)


def test_links_and_homes_that_lead_nowhere(tmp_path, monkeypatch):
    (tmp_path / "w.safetensors").symlink_to("../blobs/9f8e7d")
    with pytest.raises(FileNotFoundError, match=r"w.safetensors is a link to \.\./blobs/9f8e7d, which is not there"):
        find_parts(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="no transformer in .*w.safetensors is a link to a file that is not there"):
        find_parts(tmp_path)
    monkeypatch.setenv("HOME", str(FILE.parent))
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at ~/tiny_wan.safetensors; did you mean {FILE}"):
        find_parts("~/tiny_wan.safetensors")


def test_a_clone_without_lfs_is_told_in_the_folder_and_beside_the_file(tmp_path):
    for name in ("diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match="no transformer in .*Wan2.1_VAE.pth is a Git LFS pointer"):
        find_parts(tmp_path)
    assert identify(tmp_path / "Wan2.1_VAE.pth").why.startswith(f"{tmp_path}/Wan2.1_VAE.pth is a Git LFS pointer")
    save_file(load_file(FILE), tmp_path / "diffusion_pytorch_model.safetensors")
    assert [why.split()[0] for why in find_parts(tmp_path).unread] == [
        f"{tmp_path}/Wan2.1_VAE.pth", f"{tmp_path}/models_t5_umt5-xxl-enc-bf16.pth",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="Wan2.1_VAE.pth is a Git LFS pointer"):
        find_part(tmp_path / "Wan2.1_VAE.pth", ("VAE", "tiny VAE"))
