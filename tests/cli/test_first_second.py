"""The first second: what is asked of the command line before any work is answered without loading what is heavy."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from safetensors.numpy import save_file

from flexkern.cli import COMMANDS, command_class, stand_in
from flexkern.render.signals import leaving_quietly

REPORT = """
import sys
from flexkern.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as left:
    status = left.code
print(status, *(name for name in ("torch", "av", "numpy", "diffusers", "transformers") if name in sys.modules))
"""


def asked(*words: str) -> tuple[str, ...]:
    """The status of a command, and which heavy modules it has loaded."""
    done = subprocess.run([sys.executable, "-c", REPORT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(done.stdout.splitlines()[-1].split())


NOWHERE = [f"--weights {__file__} --{name} none" for name in ("vae", "text-encoder", "tokenizer", "lora", "image")]
NOWHERE += ["--weights none", "--prompts none", "--config-path none", "--data-path none --output-folder none"]


@pytest.mark.parametrize(
    ("words", "status", "loaded"),
    [
        ("--help", "0", ()), ("", "2", ()), ("rendr --seed 3", "2", ()), ("doctor --help", "0", ()),
        ("presets", "0", ("numpy",)), ("render --help", "0", ("numpy",)), ("render --sedd 3", "2", ("numpy",)),
        ("render --model self-forcing --help", "0", ("numpy",)), ("render --frames 0", "2", ("numpy",)),
        ("render --model causvid --sedd 3", "2", ("numpy",)), ("render --preset fle", "2", ("numpy",)),
        ("inspect", "2", ()), ("inspect none", "2", ()), ("warmup --weights none", "2", ("numpy",)),
        *((f"render --model self-forcing --prompt a {named}", "2", ("numpy",)) for named in NOWHERE),
        ("decode none", "2", ("numpy",)), ("serve --weights none --dir none", "2", ("numpy",)),
        ("metrics none.mp4", "2", ("av", "numpy")), ("sheet none.mp4 --out none/s.png", "2", ("numpy",)),
        ("fleet none --out none --shard 0/1", "2", ("numpy",)), ("fleet none --out none", "2", ("numpy",)),
        ("metrics --help", "0", ("numpy",)), ("warmup --help", "0", ("numpy",)),
    ],
)  # fmt: skip
def test_nothing_heavy_is_loaded_for_what_needs_no_work(words, status, loaded):
    assert asked(*words.split()) == (status, *loaded)


def test_a_decoder_that_is_not_there_is_told_before_torch_is_loaded(tmp_path):
    save_file({"latents": np.zeros((1, 3, 16, 4, 6), dtype=np.float32)}, tmp_path / "l.safetensors")
    words = ("decode", f"{tmp_path}/l.safetensors", "--out", f"{tmp_path}/v.mp4", "--vae", "none")
    assert asked(*words) == ("2", "numpy")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_shows_their_own_sentences(name):
    assert stand_in(name).__doc__.split() == command_class(name, [name]).__doc__.split()


WHILE_LOADING = """
    import importlib.abc, importlib.machinery, os, signal, sys, time
    from flexkern.render.signals import leaving_quietly

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name, path, target=None):
            return importlib.machinery.ModuleSpec(name, self) if name == {module!r} else None

        def exec_module(self, module):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except BaseException as error:  # what C++ does with an exception that it does not know
                os.abort()

    sys.meta_path.insert(0, Finder())
    with leaving_quietly("flexkern"):
        import {module}
"""


@pytest.mark.parametrize(("module", "status"), [("torch", 130), ("numpy", 130), ("other", -signal.SIGABRT)])
def test_ctrl_c_while_torch_loads_raises_nothing_inside_it(module, status):
    code = textwrap.dedent(WHILE_LOADING.format(module=module))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert status != 130 or (done.stdout, done.stderr) == ("", "flexkern: interrupted\n")


@pytest.mark.parametrize("words", ["doctor", "render --frames 3 --device cpu --out x.mp4"])
@pytest.mark.parametrize("seconds", [0.15, 0.6])
def test_ctrl_c_in_the_first_second_is_one_line(tmp_path, words, seconds):
    code = "import sys, flexkern.cli; print('there', flush=True); sys.exit(flexkern.cli.main(sys.argv[1:]))"
    slow = {"PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))}
    (tmp_path / "tyro.py").write_text("import time\ntime.sleep(60)\n")  # as if a disk were slow
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words.split()], cwd=tmp_path, env=os.environ | slow, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (130, "", "flexkern: interrupted\n")


INTERRUPTED = """
import importlib.abc, importlib.machinery, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
{then}
"""


def test_ctrl_c_before_the_first_line_of_the_command_is_one_line():
    code = INTERRUPTED.format(module="flexkern.cli", then="from flexkern.__main__ import main; sys.exit(main())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "flexkern: interrupted\n")


def test_whoever_handles_ctrl_c_already_goes_on_doing_so():
    def theirs(number, frame):
        pass

    before = signal.signal(signal.SIGINT, theirs)
    try:
        with leaving_quietly("flexkern"):
            assert signal.getsignal(signal.SIGINT) is theirs
    finally:
        signal.signal(signal.SIGINT, before)
    with leaving_quietly("flexkern"):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
