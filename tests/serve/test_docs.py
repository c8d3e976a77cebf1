"""The page on the server: its table is the API's description, its commands run, its command is the command."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason='needs pip install "flexkern[serve]"')
pytest.importorskip("httpx", reason='needs pip install "flexkern[test]"')

import flexkern
from flexkern.serve.openapi import WHY

PAGE = (Path(flexkern.__file__).parent / "docs" / "serve.md").read_text()


def test_the_table_of_routes_is_what_the_server_says_of_itself(shared):
    table = PAGE.partition("<!-- table: routes -->")[2].partition("<!-- end table -->")[0]
    rows = re.findall(r"^\| (\w+) \| `([^`]+)` \| (.+) \|$", table, re.MULTILINE)
    paths = shared.client.get("/openapi.json").json()["paths"]
    listed = [(path, method, one) for path, methods in paths.items() for method, one in methods.items()]
    said = [(method.upper(), path, one["description"].rstrip(".")) for path, method, one in listed]
    assert sorted(rows) == sorted(said)


def test_every_answer_that_is_described_is_explained(shared):
    paths = shared.client.get("/openapi.json").json()["paths"]
    answers = {status for methods in paths.values() for one in methods.values() for status in one["responses"]}
    assert answers == {"200", "206", *map(str, WHY)}


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_commands_of_the_page_run(server, tmp_path):
    block = PAGE.partition("```bash\n")[2].partition("```")[0].replace("\\\n", "")
    commands = [shlex.split(line.replace("http://127.0.0.1:8000/", server.address)) for line in block.splitlines()]
    assert len(commands) >= 9 and all(words[0] == "curl" for words in commands)
    identity = None
    for words in commands:
        words = [word.replace("$ID", identity or "") for word in words]
        done = subprocess.run([*words, "-sSf"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        if found := re.match(r'\{"id":"(video_\w+)"', done.stdout):
            identity = identity or found[1]
        if identity:
            server.until(identity, "completed") if "DELETE" not in words else None
    names = {"video.mp4", "grown.mp4", "small.jpg"}
    assert {path.name for path in tmp_path.iterdir()} - {"videos"} == names
    assert server.client.get(f"/v1/videos/{identity}").status_code == 404


def test_codes_of_videos_are_those_of_the_page():
    runner = (Path(flexkern.__file__).parent / "serve" / "runner.py").read_text()
    told = set(re.findall(r"^\| `(\w+)` \| ", PAGE.partition("`error.code` of a video")[2], re.MULTILINE)[:6])
    assert told == {"cancelled", "refused", "render_failed", "worker_crashed", "no_room", "interrupted"}
    assert all(f'"{code}"' in runner for code in told)
