"""Families: what they were trained with, which sizes, lengths and images they take, and how a model is found."""

import pytest
import torch

from flexkern.engine import frames_for
from flexkern.model.families import FAMILIES, PICTURES_PER_FRAME, guess_family
from flexkern.model.schedule import SCHEDULES
from flexkern.policies import PRESETS

pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')
pytest.importorskip("transformers", reason='needs pip install "flexkern[model]"')

import layouts

from flexkern.model.find import find_part, find_parts, holdings, kind_of


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_run_as_it_was_trained(name):
    family = FAMILIES[name]
    assert family.name == name and family.preset in PRESETS and family.doc and family.source
    assert (family.size, family.fps, family.chunk, family.first_chunk) == ((60, 104), 16, 3, 3)
    assert family.latent_size(480, 832) == family.size
    assert family.schedule == SCHEDULES.get(name, SCHEDULES["self-forcing"])


def test_sizes_are_multiples_of_sixteen_pixels():
    family = FAMILIES["longlive"]
    assert family.latent_size(32, 48) == (4, 6)
    for height, width, near in ((480, 830, "480x832"), (0, 16, "16x16"), (7, 40, "16x32")):
        with pytest.raises(ValueError, match=f"multiple of 16 .* got {height}x{width}; the nearest is {near}"):
            family.latent_size(height, width)


def test_latent_frames_are_whole_chunks():
    family = FAMILIES["self-forcing"].override(first_chunk=1)
    for frames in (1, 4, 19):
        family.validate_frames(frames)
    for frames, near in ((3, "1 and 4"), (21, "19 and 22")):
        with pytest.raises(ValueError, match=f"chunks of 3 latent frames, the first of 1, got {frames} .* {near}"):
            family.validate_frames(frames)
    with pytest.raises(ValueError, match="got 2 in all; the nearest are 3 and 6"):
        FAMILIES["self-forcing"].validate_frames(2)


def test_only_a_first_chunk_of_one_frame_takes_an_image():
    family = FAMILIES["self-forcing"]
    with pytest.raises(ValueError, match="of self-forcing cannot begin with one picture: .* first chunk is 3 frames"):
        family.validate_image()
    family.override(chunk=1).validate_image()
    family.override(first_chunk=1).validate_image()
    assert family.override(first_chunk=1).chunk == 3


def test_an_override_reaches_the_schedule():
    family = FAMILIES["causvid"].override(chunk=1, steps=(1000, 500, 0), shift=5.0)
    assert (family.chunk, family.first_chunk, family.schedule.steps) == (1, 1, (1000, 500))
    assert family.schedule.shift == 5.0 and not family.schedule.warp
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        family.override(chunk=0)


def test_names_tell_a_family():
    names = {"self_forcing_dmd.pt": "self-forcing", "LongLive-1.3B": "longlive", "rolling_forcing_dmd.pt": "rolling"}
    assert all(guess_family(name).startswith(family) for name, family in names.items())
    assert guess_family("Reward-Forcing-T2V-1.3B") == guess_family("rewardforcing.pt") == "reward-forcing"
    assert guess_family("model.pt") is None


def test_tensors_tell_what_a_file_is():
    transformer, lora = layouts.tiny_transformer(), layouts.peft(layouts.low_rank(layouts.tiny_transformer()))
    for kind, names in {
        "transformer": layouts.prefixed(transformer, "model._orig_mod."),
        "LoRA": lora,
        "VAE": layouts.tiny_vae(),
        "text encoder": layouts.tiny_text_encoder(),
        "tiny VAE": ["encoder.1.bias", "decoder.1.weight"],
        "embeddings": ["0", "1"],
        None: ["classifier.weight"],
    }.items():
        assert kind_of(names) == kind
    assert kind_of(layouts.to_diffusers(transformer)) == "transformer"


EXPECTED = {
    "self-forcing": ("checkpoints/self_forcing_dmd.pt", "wan_models/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth"),
    "longlive": ("longlive_models/models/longlive_base.pt", "wan_models/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth"),
    "causvid": ("model.pt", "Wan2.1_VAE.pth"),
    "rolling-forcing": ("checkpoints/rolling_forcing_dmd.pt", "wan_models/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth"),
    "reward-forcing": (
        "checkpoints/Reward-Forcing-T2V-1.3B/rewardforcing.pt",
        "checkpoints/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth",
    ),
    "wan-diffusers": ("", "vae"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_parts_are_found_in_a_folder_and_beside_a_file(name, tmp_path):
    root = layouts.LAYOUTS[name](tmp_path / "root")
    transformer, vae = (root / place for place in EXPECTED[name])
    parts = find_parts(root, prefer=FAMILIES[name].files)
    assert (parts.transformer, parts.vae, parts.text_encoder) == (transformer, vae, None)
    assert [lora.name for lora in parts.loras] == ["lora.pt"] * (name == "longlive")
    if transformer.is_file():
        assert find_parts(transformer).vae == vae
    if name == "wan-diffusers":
        parts = find_parts(root / "transformer")
        assert (parts.transformer, parts.vae) == (root / "transformer", vae)


def test_the_folder_of_wan_holds_everything(tmp_path):
    folder = layouts.save_wan(tmp_path / "wan", text=True)
    parts = find_parts(folder)
    assert (parts.transformer, parts.vae) == (folder, folder / "Wan2.1_VAE.pth")
    assert parts.text_encoder == folder / "models_t5_umt5-xxl-enc-bf16.pth"
    assert find_part(folder, ("text encoder",)) == ("text encoder", parts.text_encoder)
    assert {held.kind for held in holdings(folder)} == {"transformer", "VAE", "text encoder"}


def test_what_cannot_be_found_is_said(tmp_path):
    root = layouts.save_longlive(tmp_path / "root")
    models = root / "longlive_models/models"
    with pytest.raises(ValueError, match="several transformers in .*longlive_base.pt, .*Wan2.1-T2V-1.3B; name one"):
        find_parts(root)
    with pytest.raises(ValueError, match="lora.pt is a LoRA; expected a transformer"):
        find_parts(models / "lora.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("")
    torch.save({"x": torch.ones(1)}, tmp_path / "empty/other.pt")
    with pytest.raises(ValueError, match="no transformer in .*empty; there is 2: notes.txt, other.pt"):
        find_parts(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere"):
        find_parts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"lora.pt is not a VAE or tiny VAE: there is 1: lora.pt \(LoRA\)"):
        find_part(models / "lora.pt", ("VAE", "tiny VAE"))
    with pytest.raises(FileNotFoundError, match="no VAE at"):
        find_part(tmp_path / "nowhere", ("VAE",))


@pytest.mark.parametrize(("seconds", "frames"), [(0.01, 1), (1 / 16, 1), (2 / 16, 2), (81 / 16, 21), (60, 241)])
def test_seconds_become_latent_frames(seconds, frames):
    assert frames_for(seconds, 16, PICTURES_PER_FRAME) == frames
