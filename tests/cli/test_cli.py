"""The command line: what it renders, what it refuses and how, and which presets it lists."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import av
import pytest
import torch
from recorder import StandIn
from safetensors.torch import save_file
from videos import pictures_in

import flexkern.render
from flexkern import demo
from flexkern.checks import field_docs
from flexkern.cli.requirements import need_of
from flexkern.policies import PRESETS, SinkWindow, get_preset
from flexkern.policies.presets import POLICIES
from flexkern.render.choices import chosen_threads
from flexkern.session import Session

SAID = r"flexkern: backend \w+: auto[^\n]+\n"  # the first line of a render
ON_A_CPU = "flexkern: backend sdpa: auto, since device 'cpu' is not a CUDA GPU\n"
OTHER = "a yellow disc and a cyan triangle on black, slow"


@pytest.fixture
def session_of(jobs_of):
    """The session that a command would render."""
    return lambda *arguments: jobs_of(*arguments)[0][0].session


@pytest.mark.parametrize(("length", "pictures"), [(("--frames", "10"), 10), (("--seconds", "0.5"), 8)])
def test_render_gives_the_asked_pictures(flexkern_, tiny, length, pictures):
    status, out, err = flexkern_("render", "--model", tiny, *length, "--out", "my.mp4")
    assert status == 0 and out == f"my.mp4: {pictures} pictures, {pictures / 16:.1f} s\n"
    assert re.match(SAID, err) and (torch.cuda.is_available() or err.startswith(ON_A_CPU))
    assert re.search(rf"chunk {-(-pictures // 3)}, {pictures} of {pictures} pictures .*pictures/s, done", err)
    with av.open("my.mp4") as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.width, stream.height) == (16, 72, 72)
        assert len(list(video.decode(stream))) == pictures


def test_defaults_are_ten_seconds_of_the_demo(session_of, tmp_path):
    session = session_of()
    assert session.target == 160 and session.preset == PRESETS["flex"]
    assert session.engine.size == (36, 36) and not list(tmp_path.iterdir())


def test_a_seed_gives_the_same_bytes(flexkern_):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        flexkern_("render", "--frames", 6, "--seed", seed, "--out", f"{name}.mp4", "--no-progress")
    a, b, c = (Path(f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b != c


def test_pictures_reach_the_file_while_it_is_rendered(flexkern_, monkeypatch):
    seen, step = {}, Session.step

    def watched(session):
        if session.chunks == 16:
            seen["closed"] = pictures_in("video.mp4.parts/000000.mp4")
            seen["growing"] = Path("video.mp4.parts/000001.unfinished.mp4").is_file()
        return step(session)

    monkeypatch.setattr(Session, "step", watched)
    assert flexkern_("render", "--frames", 51)[0] == 0
    assert seen == {"closed": 32, "growing": True} and pictures_in("video.mp4") == 51


def test_overrides_replace_only_what_is_given(session_of):
    given = "--position.alpha 0.3 --position.train_len 24 --position.scale 2 --retention.sink 6 --noise.rho -0.5"
    given += " --switch.kind recache --switch.no-keep-sink"
    session = session_of("--preset", "lol", *given.split())
    changes = {"position.alpha": 0.3, "position.train_len": 24, "position.scale": 2.0, "retention.sink": 6}
    changes |= {"noise.rho": -0.5, "switch.kind": "recache", "switch.keep_sink": False}
    assert session.preset == get_preset("lol", changes)
    table = [str(0.9**band) for band in range(12)]
    assert session_of("--position.table", *table).preset.position.table == tuple(map(float, table))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_through_unchanged(session_of, name):
    assert session_of("--preset", name).preset == PRESETS[name]


def test_threads_reach_torch(session_of, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    session_of("--threads", 3)
    assert asked == [3]


def test_one_thread_is_enough_for_the_demo_unless_the_environment_says_otherwise(session_of, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    session_of()
    assert asked == [1]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    session_of()
    assert asked == [1]
    assert chosen_threads("demo", 4) == chosen_threads("self-forcing", 4) == 4


def test_a_large_model_takes_the_threads_that_torch_chooses(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert chosen_threads("self-forcing", 4) == 4 and chosen_threads("demo", 4) == 1


def test_graphs_are_taken_unless_told_otherwise(session_of, monkeypatch):
    monkeypatch.setattr("flexkern.engine.find_recorder", lambda model, backend: StandIn)
    assert session_of().passes.why_not is None
    assert session_of("--no-graphs").passes.why_not == "none are wanted, or the engine cannot have any"


def test_help_lists_every_policy_field_with_the_presets_value(flexkern_, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = flexkern_("render", "--help", "--preset", "longlive")
    assert status == 0 and re.search(r"--retention.window INT[^-]*\(default:\s+12\)", out)
    for part in POLICIES:
        policy = getattr(PRESETS["longlive"], part)
        assert field_docs(type(policy)).keys() == {field.name for field in fields(policy)}
        for field in fields(policy):
            assert f"--{part}.{field.name.replace('_', '-')}" in out


def test_options_are_explained_by_the_docstrings_below_fields(flexkern_, monkeypatch):
    docs = field_docs(SinkWindow)
    assert docs["window"] == "frames attended in all, the sink and the current chunk included"
    monkeypatch.setenv("COLUMNS", "100")
    words = " ".join(flexkern_("render", "--help")[1].split())
    kinds = {"sink": "INT", "window": "INT", "evicted": "{drop,sink,memory,sweep,choose}", "sink_rate": "FLOAT"}
    kinds |= {"slow_rate": "FLOAT", "fast_rate": "FLOAT", "average": "{tokens,frames}"}
    kinds |= dict.fromkeys(("budget", "recent", "reuse"), "INT")
    for name, text in docs.items():
        assert f"--retention.{name.replace('_', '-')} {kinds[name]} {text} (default:" in words, name


def test_prompts_follow_their_script(flexkern_, monkeypatch):
    heard = []
    monkeypatch.setattr(Session, "switch", lambda session, prompt: heard.append((session.chunks, prompt)))
    monkeypatch.setattr(Session, "cut", lambda session: heard.append((session.chunks, "cut")))
    Path("s.yaml").write_text(f"- {{at: 0, prompt: '{OTHER}'}}\n- {{at: 0.3, prompt: '{OTHER}', cut: true}}\n")
    status, _, err = flexkern_("render", "--prompts", "s.yaml", "--frames", 9, "--preset", "longlive-infinite")
    assert status == 0, err
    assert heard == [(2, OTHER), (2, "cut")]


def test_a_new_prompt_changes_the_video(flexkern_):
    Path("s.yaml").write_text(f"0: a red disc and a blue square on dark green, fast\n0.18: {OTHER}\n")
    for name, prompts in (("a", ()), ("b", ("--prompts", "s.yaml"))):
        status, _, err = flexkern_("render", "--frames", 6, "--out", f"{name}.mp4", *prompts)
        assert status == 0, err
    assert Path("a.mp4").read_bytes() != Path("b.mp4").read_bytes()


SCRIPT = "0: a red disc and a blue square on dark green"
REFUSED = {
    "unknown preset": ("--preset flax", "no preset 'flax': expected one of self-forcing, .* did you mean 'flex'"),
    "negative seconds": ("--seconds -3", "--seconds must be more than 0, got -3"),
    "endless": ("--seconds inf", "--seconds must be more than 0, got inf"),
    "no frames": ("--frames 0", "--frames must be at least 1, got 0"),
    "two lengths": ("--seconds 3 --frames 3", "give --seconds or --frames, not both"),
    "two prompts": ("--prompt x --prompts good.yaml", "give --prompt or --prompts, not both"),
    "two models": (
        "--model wan.safetensors --weights wan.safetensors",
        "give --model FILE or --weights FILE, not both",
    ),
    "negative seed": ("--seed -1", r"seed must be a whole number >= 0 and below 2\^64, got -1"),
    "no threads": ("--threads 0", "--threads must be at least 1, got 0"),
    "missing weights": ("--weights none.safetensors", "no weights at none.safetensors"),
    "missing model": (
        "--model wan-14b",
        "there is no model 'wan-14b': expected demo, self-forcing, .* or a safetensors file",
    ),
    "a folder of weights": ("--model folder.mp4", "folder.mp4 is not of the demo's form"),
    "no model at all": ("--model bad.yaml", "bad.yaml is not of the demo's form"),
    "a cut file": (
        "--model cut.safetensors",
        "cut.safetensors is cut off within its header: at least 34 bytes are missing",
    ),
    "another form": ("--model wan.safetensors", "wan.safetensors is not of the demo's form: .* give --model self-for"),
    "missing prompts": ("--prompts none.yaml", "there is no prompt file none.yaml"),
    "not YAML": ("--prompts bad.yaml", "bad.yaml is not YAML: .*line 1"),
    "late prompts": ("--prompts late.yaml", "late.yaml: the first prompt must be at 0 seconds"),
    "a prompt outside the grammar": ("--prompt cats", "the demo model knows prompts like .* got 'cats'"),
    "a later one outside it": ("--prompts cats.yaml", "the demo model knows prompts like .* got 'cats'"),
    "a cut without slots": ("--prompts cut.yaml", "the cut at 2 seconds needs position.index 'slot'"),
    "no folder": ("--out none/v.mp4", "there is no folder none"),
    "a folder": ("--out folder.mp4", "folder.mp4 is a folder"),
    "another format": ("--out v.gif", "the video must be named .mp4, .mov, or .* got 'v.gif'"),
    "small window": ("--retention.window 5 --retention.sink 3", r"window must hold the sink \(3\) and the incoming"),
    "window below the sink": ("--retention.window 2", "window must exceed the sink of 3 frames, got 2"),
    "wild rho": ("--noise.rho 2", "rho must be between -1 and 1"),
    "short table": ("--position.table 1 1", "table must hold 12 multipliers, got 2"),
    "unknown backend": ("--backend tritn", "backend 'tritn' is not there"),
    "unknown device": ("--device tpu", "--device must be cpu, cuda or cuda:N, got 'tpu'"),
    "absent device": ("--device cuda:99", "there is no device 'cuda:99': torch .* sees . CUDA GPUs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_line_and_status_2_before_any_work(flexkern_, monkeypatch, tmp_path, case):
    monkeypatch.setattr(Session, "step", lambda session: pytest.fail("work was done"))
    files = {"good": SCRIPT, "bad": "0: [", "late": "1: x", "cats": f"{SCRIPT}\n1: cats"}
    files["cut"] = f"[{{at: 0, prompt: '{OTHER}'}}, {{at: 2, prompt: '{OTHER}', cut: true}}]"
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text)
    save_file({"x": torch.zeros(1)}, "wan.safetensors")
    Path("cut.safetensors").write_bytes(Path("wan.safetensors").read_bytes()[:30])
    Path("folder.mp4").mkdir()
    before = sorted(tmp_path.iterdir())
    arguments, words = REFUSED[case]
    status, out, err = flexkern_("render", *arguments.split())
    assert status == 2 and not out
    assert re.fullmatch(rf"flexkern: error: [^\n]*({words})[^\n]*\n", err), err
    assert sorted(tmp_path.iterdir()) == before


def test_no_permission_is_one_line(flexkern_, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root is denied nothing
    assert flexkern_("render") == (2, "", "flexkern: error: no permission to write .\n")


@pytest.mark.parametrize("arguments", ["render --frames many", "render --noise.roh 0", "render --noise.kind pink", ""])
def test_what_does_not_parse_is_status_2(flexkern_, tmp_path, arguments):
    status, out, err = flexkern_(*arguments.split())
    assert status == 2 and not out and err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("module", "package"), [("av", "av"), ("tyro", "tyro"), ("tqdm", "tqdm")])
def test_a_missing_package_is_named(flexkern_, monkeypatch, module, package):
    monkeypatch.setattr(flexkern, "render", flexkern.render)  # an import sets it anew
    for name in [name for name in sys.modules if name.startswith(("flexkern.render", "flexkern.cli."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    advice = need_of(module).advice
    assert advice == 'pip install "flexkern[video]"' or module == "tyro"  # which every install brings
    said = f"flexkern: error: the package '{package}' is not installed: {advice}\n"
    assert flexkern_("render") == (2, "", said)


KEPT = "{} holds the first {} of 90 pictures; flexkern render --resume video.mp4 goes on from the start, .*"
FULL = {  # bytes that a file may have: the status, what is told
    "at the start": (100, 73, "nothing was written of 90 pictures"),
    "in the middle": (50_000, 75, KEPT.format("video.unfinished.mp4", r"(\d+)")),
    "at the end": (100_000, 75, KEPT.format("video.mp4.parts", "90")),
}


@pytest.mark.parametrize("case", FULL)
def test_a_full_disk_is_one_line_and_leaves_what_fits(flexkern_, tmp_path, case):
    """Then, with room, the render goes on and gives the bytes of one that always had it."""
    room, expected, words = FULL[case]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        status, out, err = flexkern_("render", "--frames", 90, "--no-progress")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == expected and not out
    told = re.fullmatch(rf"{SAID}flexkern: error: .*File too large: 'video.mp4'; {words}\n", err)
    assert told, err
    if status == 73:
        assert not list(tmp_path.iterdir())
        return
    if case == "in the middle":
        assert 0 < pictures_in("video.unfinished.mp4") == int(told[1]) < 90
    assert flexkern_("render", "--resume", "video.mp4", "--no-progress")[0] == 0
    assert flexkern_("render", "--frames", 90, "--no-progress", "--out", "whole.mp4")[0] == 0
    assert Path("video.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    videos = [path.name for path in tmp_path.iterdir() if path.suffix != ".json"]
    assert sorted(videos) == ["video.mp4", "whole.mp4"]


@pytest.mark.parametrize(
    ("chunks", "told"), [(3, "video.unfinished.mp4 holds the first 9"), (0, "nothing was written")]
)
def test_what_is_not_finite_is_status_1(flexkern_, monkeypatch, tmp_path, chunks, told):
    predict = Session._predict
    spoilt = lambda session, z, timestep, memory: predict(session, z, timestep, memory) / (session.chunks < chunks)
    monkeypatch.setattr(Session, "_predict", spoilt)
    status, out, err = flexkern_("render", "--frames", 30, "--no-progress")
    assert status == 1 and not out
    assert re.fullmatch(rf"{SAID}flexkern: error: the latents of chunk {chunks} .*; {told} of 30 pictures\n", err), err
    assert [pictures_in(path) for path in tmp_path.glob("*.mp4")] == [9] * bool(chunks)


def test_the_encoder_is_tried_before_the_model_loads(flexkern_, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "load_engine", lambda *_, **options: pytest.fail("the model was loaded"))
    monkeypatch.setattr(av, "__version__", "13.1.0")
    sys.modules["flexkern.render"].validate_encoder.cache_clear()  # another test has loaded it anew
    status, _, err = flexkern_("render", "--frames", 30)
    assert status == 2 and re.fullmatch(r"flexkern: error: writing video needs av [\d.]+ or newer, got 13.1.0.*\n", err)
    assert not list(tmp_path.iterdir())


def test_a_fault_of_ours_keeps_its_traceback_and_the_file(flexkern_, monkeypatch):
    step = Session.step

    def broken(session):
        if session.chunks == 2:
            raise ValueError("not the user's fault")
        return step(session)

    monkeypatch.setattr(Session, "step", broken)
    with pytest.raises(ValueError, match="not the user's fault"):
        flexkern_("render", "--frames", 30)
    assert pictures_in("video.unfinished.mp4") == 6


@pytest.mark.parametrize(
    ("chunks", "told"), [(3, "video.unfinished.mp4 holds the first 9"), (0, "nothing was written")]
)
def test_ctrl_c_is_status_130(flexkern_, stop, tmp_path, chunks, told):
    stop(chunks)
    status, out, err = flexkern_("render", "--frames", 30, "--no-progress")
    way = "; flexkern render --resume video.mp4 goes on from the start, there is no checkpoint yet" * bool(chunks)
    assert (status, out) == (130, "")
    assert re.fullmatch(f"{SAID}flexkern: interrupted: {told} of 30 pictures{way}\n", err), err
    assert [pictures_in(path) for path in tmp_path.glob("*.mp4")] == [9] * bool(chunks)
    assert len(list(tmp_path.iterdir())) == 2 * bool(chunks)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_from_outside_leaves_a_playable_file(tmp_path, tiny, number, status):
    command = [sys.executable, "-m", "flexkern.cli", "render", "--weights", tiny, "--frames", "1000000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # what runs the tests may have it ignored
    pipes = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, preexec_fn=heard, **pipes) as process:
        give_up = time.time() + 120
        while time.time() < give_up and process.poll() is None:
            if (tmp_path / "video.mp4.parts" / "000000.mp4").exists():
                break
            time.sleep(0.05)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == status, err
    kept = int(
        re.search(r"interrupted: video.unfinished.mp4 holds the first (\d+) of 1000000 pictures; .*--resume", err)[1]
    )
    assert kept > 0 and pictures_in(tmp_path / "video.unfinished.mp4") == kept


def test_presets_are_listed(flexkern_):
    status, out, _ = flexkern_("presets")
    assert status == 0
    for name, known in PRESETS.items():
        assert re.search(rf"^{name} +{re.escape(known.doc)}$", out, re.MULTILINE) and known.source in out


TRAINED = Path(demo.__file__).parent / "demo.safetensors"


@pytest.mark.skipif(not TRAINED.exists(), reason="the demo's weights are not there")
def test_the_shipped_weights_render(flexkern_, monkeypatch):
    monkeypatch.setattr(demo, "WEIGHTS", TRAINED)
    status, _, err = flexkern_("render", "--frames", 6)
    assert status == 0 and pictures_in("video.mp4") == 6, err
