"""Commands to run: the demo in a folder of its own, and checkpoints of every published layout at tiny size."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_demo import save_tiny

import flexkern.render
from flexkern import demo
from flexkern.cli import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of the demo's form that has learned nothing."""
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny.safetensors"))


@pytest.fixture
def flexkern_(tmp_path, monkeypatch, capsys, tiny):
    """Runs the command in a folder of its own, with the tiny model in the demo's place: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "WEIGHTS", Path(tiny))
    monkeypatch.setattr(demo, "ZOOM", 2)  # large noise takes long to encode

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def jobs_of(flexkern_, monkeypatch):
    """The jobs that a render would carry out, none of them run, and what it says on stderr."""

    def prepared(*arguments):
        caught = []

        def run(job, **_):
            job.close()
            return caught.append(job) or True

        monkeypatch.setattr(flexkern.render.Job, "run", run)
        status, _, err = flexkern_("render", *arguments)
        assert status == 0, err
        return caught, err

    return prepared


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A folder with every layout under the name of its family, and the embeddings of two prompts."""
    pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')
    import layouts

    root = tmp_path_factory.mktemp("disk")
    for name, save in layouts.LAYOUTS.items():
        save(root / name)
    layouts.save_prompts(root / "prompts.safetensors")
    torch.save(layouts.tiny_vae(), root / "vae.pth")
    save_file(layouts.tiny_transformer(), root / "bare.safetensors")
    Image.new("RGB", (64, 40), (200, 30, 30)).save(root / "red.png")
    return root


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, disk):
    """Runs the command in a folder of its own beside the files of ``disk``: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            status = main([str(argument).replace("@", f"{disk}/") for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run
