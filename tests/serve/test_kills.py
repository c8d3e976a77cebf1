"""The command itself, on the demo's model: killed in the middle, stopped in good order, asked twice for one folder."""

import hashlib
import json
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi", reason='needs pip install "flexkern[serve]"')
pytest.importorskip("httpx", reason='needs pip install "flexkern[test]"')

from serving import Running

PROMPT = "a red disc and a blue square on dark green, fast"
FRAMES = 15


@contextmanager
def command(root, *more):
    """The server as a process of its own: what asks it, and the process."""
    words = [sys.executable, "-m", "flexkern", "serve", "--dir", str(root), "--port", "0", "--device", "cpu"]
    words += ["--threads", "1", "--checkpoint-seconds", "0", *more]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        ready, _, _ = select.select([process.stdout], [], [], 90)
        line = process.stdout.readline() if ready else ""
        found = re.search(r"http://\S+", line)
        assert found, f"{line}{process.communicate()[1] if process.poll() is not None else ''}"
        yield Running(None, found[0], None), process
    finally:
        process.kill()
        process.communicate()


def content_hash(server, identity):
    return hashlib.sha256(server.client.get(f"/v1/videos/{identity}/content").content).hexdigest()


def in_the_middle(server, identity, root):
    """Until a part of the video is made, and there is a checkpoint."""
    end = time.monotonic() + 60
    kept = lambda: list(root.glob("jobs/*/*.parts/checkpoint-*.safetensors"))
    while not (0 < server.get(identity)["made"] < FRAMES - 6 and kept()):
        assert time.monotonic() < end and server.get(identity)["status"] in ("queued", "in_progress")
        time.sleep(0.005)


def test_a_server_that_is_killed_changes_no_byte_and_one_that_is_stopped_ends_in_good_order(tmp_path):
    with command(tmp_path) as (server, process):
        first, second = (server.post(PROMPT, frames=FRAMES, seed=3).json()["id"] for _ in range(2))
        in_the_middle(server, first, tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with command(tmp_path) as (server, process):
        assert server.get(first)["status"] in ("queued", "in_progress")
        server.until(second, "completed", patience=120)
        assert server.get(first)["made"] == FRAMES and content_hash(server, first) == content_hash(server, second)
        assert 'flexkern:resumes_total{model_name="demo"} 1.0' in server.client.get("/metrics").text
        assert "the demo model knows prompts like" in server.post("a cat").json()["error"]["message"]
        assert server.client.get(f"/v1/videos/{second}/events").text.count("event: chunk") == FRAMES // 3
        other = server.post(PROMPT, frames=FRAMES, seed=4).json()["id"]
        in_the_middle(server, other, tmp_path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.stderr.read()
    record = json.loads((tmp_path / "jobs" / other / "job.json").read_text())
    assert record["status"] == "queued" and record["tries"] == 0


@pytest.mark.parametrize(
    ("more", "environment", "why"),
    [
        (
            ["--host", "0.0.0.0"],
            {},
            "can be reached from other machines: give --token-file FILE or FLEXKERN_TOKEN",
        ),
        (["--token-file", "short"], {}, "a token needs at least 16 characters, got 5"),
        (["--token-file", "none"], {}, "No such file"),
        (["--token-file", "short"], {"FLEXKERN_TOKEN": "x" * 20}, "give --token-file or FLEXKERN_TOKEN, not both"),
        ([], {"FLEXKERN_TOKEN": "x" * 12}, "a token needs at least 16 characters, got 12"),
        (["--queue", "0"], {}, "queued must be at least 1"),
        (["--port", "70000"], {}, "a port must be 0 to 65535"),
        (["--preset", "fly"], {}, "'fly'"),
        (["--model", "longlive"], {}, "model longlive needs weights"),
    ],
)
def test_settings_that_will_not_do_are_refused_in_one_line(tmp_path, monkeypatch, capsys, more, environment, why):
    from flexkern.cli import main

    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "short").write_text("short")
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--dir", "videos", *([] if "--port" in more else ["--port", "0"]), *more])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and why in said and len(said.strip().splitlines()) == 1
    assert all(value not in said for value in environment.values())
