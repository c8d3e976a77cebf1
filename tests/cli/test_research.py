"""Configurations of the research repositories: what they say here, in place of options too, and what they do not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')
pytest.importorskip("transformers", reason='needs pip install "flexkern[model]"')

import layouts

import flexkern.render
from flexkern.policies import get_preset
from flexkern.render.research import FLAGS, FORMS, read_research
from flexkern.session import Session

SMALL = ("--size", "32x48", "--dtype", "float32", "--no-progress", "--embeddings", "@prompts.safetensors")
WEIGHTS = ("--weights", "@self-forcing")
LATENTS = ("--latents", "l.safetensors")


@pytest.fixture
def begun(command, monkeypatch):
    """Runs ``render`` without making a picture: (the jobs, status, stderr)."""
    jobs = []
    monkeypatch.setattr(flexkern.render.Job, "run", lambda job, **_: job.close() or jobs.append(job) or True)

    def run(text, *arguments, name="c.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
        jobs.clear()
        status, _, err = command("render", "--config_path", name, *SMALL, *arguments)
        return list(jobs), status, err

    return run


def test_infinite_attention_is_the_preset_of_that_name(begun):
    text = "model_kwargs:\n  use_infinite_attention: true\n  local_attn_size: 9\n"
    (job,), _, _ = begun(text, *WEIGHTS, *LATENTS, "--prompt", "a cat")
    assert job.session.preset == get_preset("longlive-infinite", {"retention.window": 9})
    (job,), _, err = begun(text, *WEIGHTS, *LATENTS, "--prompt", "a cat", "--preset", "longlive")
    assert job.session.preset == get_preset("longlive", {"retention.window": 9})
    assert "c.yaml: use_infinite_attention is not followed: --preset is\n" in err
    (job,), _, err = begun("use_infinite_attention: false", *WEIGHTS, *LATENTS, "--prompt", "a cat")
    assert job.session.preset == get_preset("flex") and "not followed" not in err


def test_a_configuration_of_memrope_is_its_preset(begun):
    method = "  compression_method: ema\n  use_block_rope: true\n  recent_size: 4\n  ema_alpha_short: 0.2\n"
    text = f"model_kwargs:\n  local_attn_size: 11\n  sink_size: 2\n{method}"
    arguments = (*WEIGHTS, *LATENTS, "--prompt", "a cat")
    (job,), _, err = begun(text, *arguments)
    expected = {"retention.window": 11, "retention.sink": 2, "retention.fast_rate": 0.2}
    assert job.session.preset == get_preset("memrope", expected) and "not supported" not in err
    (job,), _, err = begun(f"{text}  ema_adaptive: true\n", *arguments, "--preset", "longlive")
    assert "c.yaml: compression_method is not followed: --preset is\n" in err
    assert "not supported, though the video would differ: ema_adaptive" in err
    assert "without effect in longlive: ema_alpha_short of c.yaml" in err
    (job,), _, _ = begun("compression_method: eviction\n", *arguments)
    assert job.session.preset == get_preset("longlive-infinite")
    _, status, err = begun("compression_method: [ema]\n", *arguments)
    assert status == 2 and "c.yaml: compression_method must be a text, got ['ema']" in err
    _, status, err = begun("ema_adaptive: false\ncompression_method: ema\n", *arguments)
    assert status == 0 and "ema_adaptive" not in err
    _, status, err = begun("compression_method: zip\n", *arguments)
    assert status == 2 and "c.yaml: compression_method must be ema or eviction, got 'zip'" in err


def test_first_chunk_steps_are_the_schedules(begun):
    text = "denoising_step_list: [1000, 500]\ndenoising_step_list_first_chunk: [1000, 750, 500, 250, 0]\n"
    text += "warp_denoising_step: false\n"
    (job,), _, _ = begun(text, *WEIGHTS, *LATENTS, "--prompt", "a cat")
    schedule = job.session.engine.schedule
    assert schedule.timesteps() == [1000, 500]
    assert schedule.timesteps(first_chunk=True) == [1000, 750, 500, 250]


def test_a_configuration_alone_is_a_command(begun, disk):
    """As ``python inference.py --config_path x.yaml`` of LongLive: weights, prompts, length, seed, folder are its."""
    Path("p.txt").write_text("a cat\na dog\na cat\n")
    text = f"generator_ckpt: {disk}/self-forcing\ndata_path: p.txt\noutput_folder: v\nnum_output_frames: 6\nseed: 7\n"
    text += "inference_iter: 2\nnum_samples: 1\nsave_with_index: true\nuse_ema: true\nlora_ckpt: null\n"
    jobs, status, err = begun(text)
    assert status == 0, err
    assert [(str(job.order.target), job.order.seed) for job in jobs] == [("v/0000.mp4", 7), ("v/0001.mp4", 8)]
    assert [job.order.prompts for job in jobs] == [("a cat",), ("a dog",)] and jobs[0].order.pictures == 21
    assert "c.yaml: taken from it: --" in err and "inference_iter 2: the first 2 of 3 prompts" in err
    given = ("--prompt", "a dog", "--seed", 1, "--frames", 2, "--out", "mine.mp4", "--no-ema", *WEIGHTS)
    (job,), status, err = begun(text, *given)
    assert (job.order.prompts, job.order.seed, job.order.pictures) == (("a dog",), 1, 2)
    assert job.order.target == Path("mine.mp4")


def test_the_shape_of_a_configuration_is_the_size(command, disk):
    Path("c.yaml").write_text("image_or_video_shape: [1, 21, 16, 4, 6]\n")
    given = ("--dtype", "float32", "--no-progress", *SMALL[-2:], *WEIGHTS, *LATENTS, "--prompt", "a cat", "--frames", 1)
    assert command("render", "--config_path", "c.yaml", *given)[0] == 0
    assert load_file("l.safetensors")["latents"].shape[-2:] == (4, 6)


def test_its_lora_is_merged_with_the_adapters_scale(command, disk, tmp_path):
    """Found as seen from here, from the configuration, or from the folder above it; never left out."""
    lora, made = (disk / "longlive/longlive_models/models/lora.pt").read_bytes(), {}
    rest = (*SMALL, *WEIGHTS, "--prompt", "a cat", "--frames", 1)
    Path("repository/configs").mkdir(parents=True)
    Path("repository/models").mkdir()
    for name, where, alpha in (
        ("above", "repository/models", 8),
        ("beside", "repository/configs", 8),
        ("half", ".", 4),
    ):
        Path(where, "lora.pt").write_bytes(lora)
        ckpt = "models/lora.pt" if name == "above" else "lora.pt"
        Path("repository/configs/c.yaml").write_text(
            f"lora_ckpt: {ckpt}\nadapter: {{type: lora, rank: 8, alpha: {alpha}}}\n"
        )
        flags = ("--config_path", "repository/configs/c.yaml", "--latents", f"{name}.safetensors")
        status, _, err = command("render", *flags, *rest)
        assert status == 0 and f"--lora {'.' if name == 'half' else ''}"[:6] in err, err
        made[name] = load_file(f"{name}.safetensors")["latents"]
    for name, scale in (("one", ()), ("0.5", ("--lora-scale", 0.5))):
        flags = ("--model", "self-forcing", "--lora", "lora.pt", *scale, "--latents", f"{name}.safetensors")
        assert command("render", *flags, *rest)[0] == 0
        made[name] = load_file(f"{name}.safetensors")["latents"]
    assert torch.equal(made["above"], made["one"]) and torch.equal(made["beside"], made["one"])
    assert torch.equal(made["half"], made["0.5"]) and not torch.allclose(made["half"], made["one"])


def test_a_lora_that_is_not_there_stops_the_render(begun):
    _, status, err = begun("lora_ckpt: models/lora.pt\n", *WEIGHTS, *LATENTS, "--prompt", "a cat")
    told = "names lora_ckpt models/lora.pt, which is neither here nor beside it: give --lora, or take it out"
    assert status == 2 and told in err
    flags = ("--lora", "@longlive/longlive_models/models/lora.pt")
    jobs, _, err = begun("lora_ckpt: models/lora.pt\n", *WEIGHTS, *LATENTS, *flags, "--prompt", "a cat")
    assert jobs and "its lora_ckpt and adapter are not used: --lora is" in err


def interactive(*lines):
    Path("i.jsonl").write_text("".join(json.dumps({"prompts": line}) + "\n" for line in lines))
    return ("--data_path", "i.jsonl", "--output_folder", "v", *WEIGHTS)


def test_several_prompts_of_a_line_follow_each_other(begun, monkeypatch):
    """At the latent frames of switch_frame_indices, else evenly; and they reach the session in that order."""
    given = interactive(["a cat", "a dog"], ["a dog", "a cat"])
    jobs, status, err = begun("num_output_frames: 12\nswitch_frame_indices: 9\n", *given)
    assert status == 0, err
    assert [[s.prompt for s in job.order.script] for job in jobs] == [["a cat", "a dog"], ["a dog", "a cat"]]
    assert {job.order.script[1].at for job in jobs} == {33 / 16}  # nine latent frames give 33 pictures
    jobs, _, _ = begun("num_output_frames: 12\n", *given)
    assert {job.order.script[1].at for job in jobs} == {21 / 16}  # two of four chunks
    jobs, _, err = begun("switch_frame_indices: '6, 12'\n", *interactive(["a cat", "a dog", "a cat"]))
    assert [s.at for s in jobs[0].order.script] == [0, 21 / 16, 45 / 16] and jobs[0].order.pictures == 69
    jobs, _, err = begun("sink_size: 3\n", *interactive(["a cat", "a dog", "a cat"]))
    assert jobs[0].order.pictures == 480 and "each of 3 prompts is shown for 10 seconds" in err


def test_a_switch_of_an_interactive_file_happens(command, monkeypatch):
    heard = []
    switch = Session.switch
    monkeypatch.setattr(Session, "switch", lambda s, prompt: heard.append((s.next_frame, prompt)) or switch(s, prompt))
    Path("c.yaml").write_text("num_output_frames: 9\nswitch_frame_indices: [6]\n")
    status, _, err = command("render", "--config_path", "c.yaml", *SMALL, *interactive(["a cat", "a dog"]))
    assert status == 0 and heard == [(6, "a dog")], err


KEYS = {
    "lr: 1\nlr_critic: 2\nreal_name: x": "for training only: lr, lr_critic, real_name",
    "lr: 1\nbeta1: 0\nreal_name: x\ntrainer: a": "for training only: 4 keys",
    "use_relative_rope: true": "not supported, though the video would differ: use_relative_rope",
    "use_relative_rope: false": None,
    "i2v: true\nlr: 1": "not supported, though the video would differ: i2v; for training only: lr",
    "model_name: Wan2.2-TI2V-5B": "not supported, though the video would differ: model_name Wan2.2-TI2V-5B",
    "model_kwargs: {model_name: Wan2.1-T2V-14B}": None,
    "save_with_index: false": "save_with_index: false .videos are named by number.",
    "adapter: {rank: 4, alpha: 4}": "adapter without lora_ckpt",
    "moods: 3": "unknown: moods",
}


@pytest.mark.parametrize("text", KEYS)
def test_keys_that_are_not_used_are_told_apart(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    note = read_research(tmp_path / "c.yaml").note
    assert note == (KEYS[text] and note) and (KEYS[text] is None or KEYS[text].replace(".", "") in
                                              note.replace("(", "").replace(")", "").replace(".", ""))  # fmt: skip


SELF_FORCING = """
generator_ckpt: checkpoints/ode_init.pt
generator_fsdp_wrap_strategy: size
real_score_fsdp_wrap_strategy: size
text_encoder_fsdp_wrap_strategy: size
real_name: Wan2.1-T2V-14B
denoising_step_list: [1000, 750, 500, 250]
warp_denoising_step: true
ts_schedule: false
num_train_timestep: 1000
timestep_shift: 5.0
guidance_scale: 3.0
denoising_loss_type: flow
mixed_precision: true
seed: 0
sharding_strategy: hybrid_full
lr: 2.0e-06
lr_critic: 4.0e-07
beta1: 0.0
beta2: 0.999
beta1_critic: 0.0
beta2_critic: 0.999
data_path: prompts/vidprom_filtered_extended.txt
batch_size: 1
ema_weight: 0.99
ema_start_step: 200
total_batch_size: 64
log_iters: 50
negative_prompt: 'worst quality'
dfake_gen_update_ratio: 5
image_or_video_shape: [1, 21, 16, 60, 104]
distribution_loss: dmd
trainer: score_distillation
gradient_checkpointing: true
num_frame_per_block: 3
load_raw_video: false
model_kwargs: {timestep_shift: 5.0}
"""


def test_a_training_configuration_is_used_for_what_it_says_of_inference(begun):
    """Forty keys, none of which would change the video and is not followed; its prompts are not asked for."""
    (job,), status, err = begun(SELF_FORCING, *WEIGHTS, *LATENTS, "--prompt", "a cat", "--frames", 1)
    assert status == 0 and job.session.engine.chunk == 3
    assert "not supported" not in err and "unknown" not in err and "for training only: 27 keys" in err


WRONG = {
    "num_frame_per_block: 3\nnum_frame_per_block: 4": "'num_frame_per_block' is written twice, line 2",
    "use_infinite_attention: 1": "use_infinite_attention must be true or false, got 1",
    "denoising_step_list_first_chunk: [a]": "denoising_step_list_first_chunk must be a list of numbers",
    "image_or_video_shape: [1, 21, 48, 60, 104]": "has 48 channels; expected 16, as Wan 2.1 has",
    "image_or_video_shape: [60, 104]": "must be 5 whole numbers",
    "adapter: {type: dora}": "adapter.type must be lora, got 'dora'",
    "adapter: {rank: 0}": "adapter.rank and adapter.alpha must be numbers above 0",
    "switch_frame_indices: 40, 20": "switch_frame_indices must be latent frames that ascend from at least 1",
    "switch_frame_indices: 0": "switch_frame_indices must be latent frames that ascend",
    "num_output_frames: 0": "num_output_frames must be at least 1, got 0",
    "seed: -1": "seed must be a whole number >= 0, got -1",
    "seed: true": "seed must be a whole number, got True",
    "model_kwargs: 3": "model_kwargs must be a mapping, got 3",
    "lora_ckpt: [a]": "lora_ckpt must be a text",
    "context_noise: -1": "context_noise must be a timestep from 0 to 1000, got -1",
    "model_kwargs: {context_noise: 2000}": "context_noise must be a timestep from 0 to 1000, got 2000",
    "context_noise: .nan": "context_noise must be finite, got nan",
    "timestep_shift: .inf": "timestep_shift must be finite, got inf",
    "timestep_shift: -5": "timestep_shift must be > 0, got -5",
    "denoising_step_list: [1000, .nan]": "denoising_step_list must be finite, got [1000, nan]",
    "denoising_step_list_first_chunk: [10, 20]": "denoising_step_list_first_chunk must fall from at most 1000",
    "denoising_step_list: 1000": "denoising_step_list must be a list of numbers, got 1000",
    "adapter: {rank: 4, alpha: .inf}": "adapter.alpha must be finite, got inf",
    "output_folder: ${oc.env:HOME}/vids": "output_folder is '${oc.env:HOME}/vids', in which OmegaConf would fill in ${",
    "seed: ${other}": "seed is '${other}', in which OmegaConf",
    "denoising_step_list: ['${a}', 3]": "denoising_step_list is ['${a}', 3], in which OmegaConf",
    "adapter: {rank: '${a}'}": "adapter.rank is '${a}', in which OmegaConf",
    "- 1": "expected a mapping of keys to values, got list",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_values_are_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        read_research(tmp_path / "c.yaml")
    assert "c.yaml" in str(error.value) and WRONG[text] in str(error.value)


def test_what_is_left_to_a_command_line_is_not_said(tmp_path):
    (tmp_path / "c.yaml").write_text("output_folder: ???\nseed: ???\nsomething: ${other}\nnum_frame_per_block: 1\n")
    found = read_research(tmp_path / "c.yaml")
    assert not found.flags and found.family == {"chunk": 1} and found.unknown == ("something",)


def test_a_key_without_effect_is_named(begun):
    (job,), _, err = begun("global_sink: false\nsink_size: 1\n", *WEIGHTS, *LATENTS, "--prompt", "a cat")
    assert job.session.preset.retention.sink == 1
    assert "flexkern: without effect in flex: global_sink of c.yaml; see flexkern presets flex\n" in err
    assert "without effect" not in begun("global_sink: true\n", *WEIGHTS, *LATENTS, "--prompt", "a cat")[2]


@pytest.mark.parametrize(
    ("text", "lines", "words"),
    [
        (
            "switch_frame_indices: 3, 6\n",
            (["a cat", "a dog"],),
            "2 switch_frame_indices are for 3 prompts, video 1 has 2",
        ),
        ("num_output_frames: 3\n", (["a cat", "a dog"],), "2 prompts need as many chunks, the video has 1"),
        ("num_output_frames: 6\nswitch_frame_indices: 9\n", (["a cat", "a dog"],), "at 2.0625 seconds is never shown"),
        ("num_output_frames: 9\nswitch_frame_indices: 4, 5\n", (["a cat", "a dog", "a cat"],), "with the same chunk"),
    ],
)
def test_switches_that_cannot_be_shown_are_refused(begun, text, lines, words):
    jobs, status, err = begun(text, *interactive(*lines))
    assert status == 2 and not jobs and words in err and not Path("v").exists()


def test_switch_times_without_several_prompts_are_named(begun):
    jobs, _, err = begun("switch_frame_indices: 9\n", *WEIGHTS, *LATENTS, "--prompt", "a cat", "--frames", 1)
    assert jobs and "c.yaml: switch_frame_indices is not used: it is for several prompts" in err


def test_every_key_has_a_form():
    assert FLAGS.keys() <= FORMS.keys()


def test_zero_sum_needs_more_than_one_frame(begun, monkeypatch):
    monkeypatch.setattr("flexkern.model.checkpoint.load_transformer", lambda *_, **__: pytest.fail("weights were read"))
    for flags in (("--chunk", 1), ("--first-chunk", 1)):
        _, status, err = begun(
            "sink_size: 1", *WEIGHTS, *LATENTS, "--prompt", "a cat", "--noise.kind", "zero_sum", *flags
        )
        assert status == 2 and "zero_sum needs chunks of at least 2 frames, got 1" in err


def test_several_loras_are_all_applied_or_refused(command, tmp_path):
    for name, target in (("one", "blocks.0.self_attn.q"), ("two", "blocks.1.ffn.0")):
        shape = layouts.tiny_transformer()[f"{target}.weight"].shape
        pair = (torch.randn(4, shape[1]) / 8, torch.randn(shape[0], 4) / 8)
        torch.save(layouts.peft({target: pair}), f"{name}.pt")
    made = {}
    for name, flags in {
        "both": ("--lora", "one.pt", "--lora", "two.pt"), "one": ("--lora", "one.pt"), "two": ("--lora", "two.pt"),
        "first": ("--lora", "one.pt", "--lora-scale", 1, "--lora", "two.pt", "--lora-scale", 0),
    }.items():  # fmt: skip
        given = ("--model", "self-forcing", *SMALL, *WEIGHTS, "--prompt", "a cat", "--frames", 1)
        status, _, err = command("render", *given, *flags, "--latents", f"{name}.safetensors")
        assert status == 0, err
        made[name] = load_file(f"{name}.safetensors")["latents"]
    assert torch.equal(made["first"], made["one"])
    assert not torch.allclose(made["both"], made["one"]) and not torch.allclose(made["both"], made["two"])
