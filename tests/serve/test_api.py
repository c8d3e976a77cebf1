"""The Videos API, asked by a real client: what it takes, gives and refuses."""

import io
import json

import pytest

pytest.importorskip("fastapi", reason='needs pip install "flexkern[serve]"')
pytest.importorskip("httpx", reason='needs pip install "flexkern[test]"')

from serving import check

from flexkern.render.writer import load_av
from flexkern.serve.shapes import LONGEST


def pictures_in(content):
    with load_av().open(io.BytesIO(content)) as film:
        return sum(1 for _ in film.decode(video=0))


def refused(answer, status, code, param=None):
    assert answer.status_code == status, answer.text
    problem = answer.json()["error"]
    assert (problem["code"], problem["param"]) == (code, param), problem
    return problem["message"]


def test_a_video_is_asked_for_made_and_fetched(shared):
    asked = shared.post("a", seconds="1.5", frames=None, seed=3, preset="longlive", size="288x288")
    video = asked.json()
    assert asked.status_code == 200 and video["object"] == "video" and video["id"].startswith("video_")
    assert (video["status"], video["progress"], video["completed_at"], video["error"]) == ("queued", 0, None, None)
    assert (video["seconds"], video["size"], video["frames"], video["seed"]) == ("1.5", "288x288", 24, 3)
    assert (video["model"], video["prompt"], video["preset"]) == ("demo", "a", "longlive")
    done = shared.until(video["id"], "completed")
    assert done["progress"] == 100 and done["made"] == 24 and done["completed_at"] >= done["created_at"]
    content = shared.client.get(f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4" and pictures_in(content.content) == 24
    part = shared.client.get(f"/v1/videos/{video['id']}/content", headers={"Range": "bytes=4-7"})
    assert part.status_code == 206 and part.content == content.content[4:8] == b"ftyp"
    small = shared.client.get(f"/v1/videos/{video['id']}/content?variant=thumbnail")
    assert small.headers["content-type"] == "image/jpeg" and small.content.startswith(b"\xff\xd8")


def test_prompts_over_time_and_in_turn(shared):
    script = [{"at": 0, "prompt": "a"}, {"at": 2, "prompt": "b"}, {"at": 4.5, "prompt": "c"}]
    video = shared.client.post("/v1/videos", json={"prompts": script}).json()
    assert video["seconds"] == "7" and [one["at"] for one in video["prompts"]] == [0, 2, 4.5]
    assert video["prompt"] == "a" and not any(one["cut"] for one in video["prompts"])
    video = shared.client.post("/v1/videos", json={"prompts": ["a", "b"]}).json()
    assert video["seconds"] == "8" and video["prompts"] == ["a", "b"]


def test_overrides_reach_the_job(shared):
    video = shared.post(overrides={"retention.window": 12, "position.train_len": 24}).json()
    assert video["overrides"] == {"retention.window": 12, "position.train_len": 24}
    assert shared.service.store.get(video["id"]).spec["overrides"] == video["overrides"]


def test_a_form_does_as_well_as_json(shared):
    script = json.dumps([{"at": 0, "prompt": "ä"}, {"at": 1, "prompt": "b\nc"}])
    fields = {"prompts": script, "seconds": "2", "seed": "7", "size": "", "extra_body": '{"preset": "pi", "crf": 20}'}
    answer = shared.client.post("/v1/videos", files={name: (None, value) for name, value in fields.items()})
    video = answer.json()
    assert answer.status_code == 200 and (video["seed"], video["preset"], video["frames"]) == (7, "pi", 32)
    assert [one["prompt"] for one in video["prompts"]] == ["ä", "b\nc"]


@pytest.mark.parametrize(
    ("given", "code", "param"),
    [
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": " \n"}, "invalid_value", "prompt"),
        ({"prompt": "a\x00b"}, "invalid_value", "prompt"),
        ({"prompt": "a" * (LONGEST + 1)}, "invalid_value", "prompt"),
        ({"prompt": None}, "missing_value", "prompt"),
        ({"prompts": ["b"]}, "invalid_value", "prompt"),
        ({"prompt": None, "prompts": []}, "invalid_value", "prompts"),
        ({"prompt": None, "prompts": [{"at": 1, "prompt": "a"}]}, "invalid_value", "prompts"),
        ({"prompt": "what the model does not know"}, "invalid_value", None),
        ({"seconds": "4"}, "invalid_value", "frames"),
        ({"frames": None, "seconds": "0"}, "invalid_value", "seconds"),
        ({"frames": None, "seconds": "121"}, "too_long", "seconds"),
        ({"frames": 121 * 16}, "too_long", "frames"),
        ({"frames": 0}, "invalid_value", "frames"),
        ({"size": "16x16"}, "invalid_value", "size"),
        ({"size": "wide"}, "invalid_value", "size"),
        ({"seed": -1}, "invalid_value", "seed"),
        ({"seed": "3"}, "invalid_value", "seed"),
        ({"seed": 2**64}, "invalid_value", "seed"),
        ({"model": "sora-2"}, "model_not_found", "model"),
        ({"preset": "fly"}, "invalid_value", "preset"),
        ({"overrides": {"retention.sinks": 3}}, "invalid_value", "overrides"),
        ({"overrides": {"retention.window": 4000}}, "too_large", "overrides"),
        ({"preset": "rolling-sink", "overrides": {"retention.window": 40}}, "too_large", "overrides"),
        (
            {"preset": "rolling-sink", "overrides": {"retention.sink": 1, "retention.window": 30}},
            "too_large",
            "overrides",
        ),
        ({"negative_prompt": "b"}, "unknown_field", "negative_prompt"),
        ({"sead": 3}, "unknown_field", "sead"),
    ],
)
def test_what_will_not_do_is_told_before_it_waits(shared, given, code, param):
    before = len(list(shared.service.store.root.glob("jobs/*")))
    message = refused(shared.post(**given), 400, code, param)
    assert message and "Traceback" not in message
    assert len(list(shared.service.store.root.glob("jobs/*"))) == before


def test_a_misspelt_field_gets_the_right_one(shared):
    assert "did you mean 'seed'?" in refused(shared.post(sead=3), 400, "unknown_field", "sead")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"null", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}'])
def test_a_body_that_is_no_request(shared, body):
    answer = shared.client.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


PARTS = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", b'{"prompt": "a"}', 415),
        ("application/x-www-form-urlencoded", b"prompt=a", 415),
        ("multipart/form-data", b"prompt=a", 400),
        (PARTS, b"--x\r\n\r\na\r\n--x--", 400),
        (PARTS, b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na', 400),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n\xff\r\n--x--',
            400,
        ),
    ],
)
def test_a_body_of_another_kind(shared, kind, body, status):
    answer = shared.client.post("/v1/videos", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_file_in_a_form_is_refused_by_name(shared):
    files = {"prompt": (None, "a"), "input_reference": ("../../etc/passwd", b"x", "image/png")}
    refused(shared.client.post("/v1/videos", files=files), 400, "unsupported_field", "input_reference")


def test_a_body_that_is_too_large(shared):
    large = {"Content-Type": "application/json"}
    refused(shared.client.post("/v1/videos", content=b" " * (1 << 21), headers=large), 413, "too_large")
    parts = (b" " * 65536 for _ in range(40))  # that does not say how much there is
    refused(shared.client.post("/v1/videos", content=parts, headers=large), 413, "too_large")


def test_lists_go_by_time_and_in_pages(server):
    made = [server.post(f"number {i}").json()["id"] for i in range(5)]
    ask = lambda **given: server.client.get("/v1/videos", params=given)
    page = ask(limit=2).json()
    assert [video["id"] for video in page["data"]] == made[:2:-1] and page["has_more"]
    assert (page["object"], page["first_id"], page["last_id"]) == ("list", made[4], made[3])
    rest = ask(limit=100, after=page["last_id"]).json()
    assert [video["id"] for video in rest["data"]] == made[2::-1] and not rest["has_more"]
    assert [video["id"] for video in ask(order="asc", limit=1).json()["data"]] == made[:1]
    assert ask(after=made[0]).json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False
    }  # fmt: skip
    refused(ask(limit=0), 400, "invalid_value", "limit")
    refused(ask(limit=101), 400, "invalid_value", "limit")
    refused(ask(order="sideways"), 400, "invalid_value", "order")
    refused(ask(after="video_0"), 404, "not_found", "video_id")


PATHS = ["..%2f..%2fetc%2fpasswd", "%2e%2e", "video_", "video_" + "0" * 32, "video_" + "0" * 31 + "/", "job.json%00"]


@pytest.mark.parametrize("identity", PATHS)
@pytest.mark.parametrize(("method", "end"), [("GET", ""), ("GET", "/content"), ("GET", "/stream"), ("GET", "/events"),
                                             ("DELETE", ""), ("POST", "/cancel")])  # fmt: skip
def test_an_id_is_no_path(shared, identity, method, end):
    answer = shared.client.request(method, f"/v1/videos/{identity}{end}")
    assert answer.status_code in (404, 405) and answer.json()["error"]["code"] in ("not_found", "wrong_method")
    assert "passwd" not in answer.text


def test_no_answer_tells_where_files_lie(server):
    identity = server.post("it fails").json()["id"]
    video = server.until(identity, "failed")
    assert video["error"] == {"code": "render_failed", "message": "video.mp4: a layer is not finite"}
    shown = [server.client.get(path).text for path in (f"/v1/videos/{identity}", "/v1/videos", "/metrics", "/health")]
    shown.append(server.client.get(f"/v1/videos/{identity}/events").text)
    assert not any(str(server.service.store.root) in text for text in shown)


def test_a_video_that_is_not_there_yet_has_no_content(server):
    identity = server.post("it waits").json()["id"]
    refused(server.client.get(f"/v1/videos/{identity}/content"), 404, "not_ready", "variant")
    refused(server.client.get(f"/v1/videos/{identity}/content?variant=sprite"), 400, "invalid_value", "variant")
    server.until(identity, "in_progress")


def test_a_video_that_was_deleted_is_gone(server):
    identity = server.post().json()["id"]
    server.until(identity, "completed")
    gone = server.client.delete(f"/v1/videos/{identity}")
    assert gone.json() == {"id": identity, "object": "video.deleted", "deleted": True}
    assert server.client.get(f"/v1/videos/{identity}").status_code == 404
    assert server.client.delete(f"/v1/videos/{identity}").status_code == 404
    assert server.client.get("/v1/videos").json()["data"] == []
    assert list(server.service.store.root.glob("jobs/*")) == []


def test_the_model_says_what_may_be_asked(shared):
    (card,) = shared.client.get("/v1/models").json()["data"]
    assert (card["id"], card["size"], card["fps"], card["max_seconds"]) == ("demo", "288x288", 16, 120)
    assert card["preset"] == "flex" and "longlive" in card["presets"] and card["example"] == "a"


def test_a_check_of_the_worker_is_asked(shared):
    assert check is not None
    message = refused(shared.post("what the model does not know"), 400, "invalid_value")
    assert message == "the model knows other prompts"


def test_every_error_has_one_form(shared):
    for answer in (shared.client.get("/nothing"), shared.client.put("/v1/videos"), shared.client.get("/v1/videos/")):
        problem = answer.json()["error"]
        assert answer.status_code in (404, 405) and problem.keys() == {"message", "type", "param", "code"}
