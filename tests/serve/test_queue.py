"""What becomes of videos: the queue and its end, workers that end, servers that end."""

import json
import os
import signal
import time

import pytest

pytest.importorskip("fastapi", reason='needs pip install "flexkern[serve]"')
pytest.importorskip("httpx", reason='needs pip install "flexkern[test]"')

from serving import serving, stand_in

from flexkern.serve.served import Limits


def until(condition, patience=20):
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def test_a_full_queue_says_when_to_come_again(tmp_path):
    with serving(tmp_path, limits=Limits(queued=2)) as server:
        first = server.post("it waits").json()["id"]
        server.until(first, "in_progress")
        waiting = [server.post().json()["id"] for _ in range(2)]
        assert [server.get(one)["position"] for one in waiting] == [0, 1]
        answer = server.post()
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full" and answer.json()["error"]["type"] == "rate_limit_error"
        assert 'flexkern:refused_total{model_name="demo",reason="queue_full"} 1.0' in server.client.get("/metrics").text
        server.client.post(f"/v1/videos/{first}/cancel")
        for one in waiting:
            server.until(one, "completed")
        assert server.post().status_code == 200


def test_videos_are_made_in_turn(server):
    made = [server.post(f"number {i}").json()["id"] for i in range(4)]
    done = [server.until(one, "completed") for one in made]
    started = [server.service.store.get(one).started for one in made]
    assert started == sorted(started) and all(video["made"] == 16 for video in done)


def test_a_video_that_waits_is_cancelled_at_once(server):
    first, second = (server.post("it waits").json()["id"] for _ in range(2))
    video = server.client.post(f"/v1/videos/{second}/cancel").json()
    assert (video["status"], video["error"]["code"]) == ("failed", "cancelled")
    server.until(first, "in_progress")
    assert server.client.post(f"/v1/videos/{first}/cancel").status_code == 200
    assert server.until(first, "failed")["error"]["code"] == "cancelled"
    again = server.client.post(f"/v1/videos/{first}/cancel")
    assert again.status_code == 409 and again.json()["error"]["code"] == "over"
    server.until(server.post().json()["id"], "completed")


def test_a_video_that_is_being_made_is_deleted(server):
    identity = server.post("it waits").json()["id"]
    server.until(identity, "in_progress")
    assert server.client.delete(f"/v1/videos/{identity}").status_code == 200
    assert server.client.get(f"/v1/videos/{identity}").status_code == 404
    until(lambda: not list(server.service.store.root.glob("jobs/*")))
    server.until(server.post().json()["id"], "completed")


def test_a_worker_that_does_not_stop_is_killed(server, monkeypatch):
    monkeypatch.setattr("flexkern.serve.runner.PATIENCE", 0.2)
    identity = server.post("it hangs").json()["id"]
    server.until(identity, "in_progress")
    server.client.post(f"/v1/videos/{identity}/cancel")
    assert server.until(identity, "failed")["error"]["code"] == "cancelled"
    server.until(server.post().json()["id"], "completed")


def test_a_worker_that_is_killed_costs_one_try(server):
    identity = server.post("it waits").json()["id"]
    until(lambda: server.get(identity)["made"])
    (child,) = server.service.runner._children.values()
    os.kill(child._process.pid, signal.SIGKILL)
    until(lambda: server.service.store.get(identity).tries == 1 and server.get(identity)["status"] == "in_progress")
    assert server.client.get("/health").json()["status"] == "ok"
    text = server.client.get("/metrics").text
    assert 'flexkern:worker_crashes_total{model_name="demo"} 1.0' in text
    assert 'flexkern:retries_total{model_name="demo"} 1.0' in text


def test_a_video_that_ends_its_worker_each_time_fails_with_the_reason(tmp_path):
    said = []
    with serving(tmp_path, said=said) as server:
        identity, other = server.post("it crashes").json()["id"], server.post().json()["id"]
        error = server.until(identity, "failed")["error"]
        assert (
            error["code"] == "worker_crashed" and "status 7" in error["message"] and "tried 3 times" in error["message"]
        )
        assert "the worker says something before it ends" in error["message"]
        server.until(other, "completed")
    assert len([line for line in said if identity in line]) == 3


def test_a_disk_without_room_is_tried_again_and_told(server):
    identity = server.post("it is full").json()["id"]
    error = server.until(identity, "failed")["error"]
    assert error == {"code": "no_room", "message": "no space left on device: video.mp4 (tried 3 times)"}


def test_a_worker_that_does_not_start_fails_no_video(tmp_path, monkeypatch):
    monkeypatch.setattr("flexkern.serve.runner.PAUSES", (0.0, 0.05))
    said, commands = [], [stand_in(tmp_path, 0, "never-ready")]
    with serving(tmp_path, commands=commands, said=said) as server:
        identity = server.post().json()["id"]
        health = until(lambda: (found := server.client.get("/health").json())["status"] == "degraded" and found)
        assert health["workers"] == ["does not start"] and server.get(identity)["status"] == "queued"
    assert "no module named torch" in said[0]


def test_two_workers_make_two_videos_at_a_time(tmp_path):
    with serving(tmp_path, commands=[stand_in(tmp_path, i) for i in range(2)]) as server:
        both = [server.post("it waits").json()["id"] for _ in range(2)]
        for one in both:
            server.until(one, "in_progress")
        assert server.client.get("/health").json()["in_progress"] == 2


def test_a_server_that_is_stopped_leaves_its_videos_to_the_next(tmp_path):
    with serving(tmp_path) as server:
        running, waiting = (server.post(prompt).json()["id"] for prompt in ("it waits", "b"))
        done = server.post("c").json()["id"]
        server.client.delete(f"/v1/videos/{done}")
        server.until(running, "in_progress")
    records = {one: json.loads((tmp_path / "jobs" / one / "job.json").read_text()) for one in (running, waiting)}
    assert [records[one]["status"] for one in (running, waiting)] == ["queued", "queued"]
    assert records[running]["tries"] == 0
    with serving(tmp_path) as server:
        server.until(running, "in_progress")
        server.client.post(f"/v1/videos/{running}/cancel")
        server.until(waiting, "completed")
        assert len(server.client.get("/v1/videos").json()["data"]) == 2


def test_a_second_server_of_a_folder_is_refused(tmp_path):
    with serving(tmp_path), pytest.raises(BlockingIOError, match="another server has the folder"), serving(tmp_path):
        pass


def test_a_record_that_is_damaged_is_left_out_and_told(tmp_path):
    said = []
    with serving(tmp_path) as server:
        good, bad = (server.post().json()["id"] for _ in range(2))
        server.until(bad, "completed")
    record = tmp_path / "jobs" / bad / "job.json"
    record.write_text(record.read_text()[:50])
    (tmp_path / "jobs" / "notes").mkdir()
    (tmp_path / "jobs" / f"video_{'0' * 32}").mkdir()  # killed before its record was written
    with serving(tmp_path, said=said) as server:
        assert [video["id"] for video in server.client.get("/v1/videos").json()["data"]] == [good]
    assert len(said) == 1 and bad in said[0] and record.exists()
    assert (tmp_path / "jobs" / "notes").exists() and not (tmp_path / "jobs" / f"video_{'0' * 32}").exists()


def test_a_disk_that_is_full_takes_no_job(server, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexkern.serve.store.write_json", full)
    answer = server.post()
    assert answer.status_code == 507 and answer.json()["error"]["code"] == "no_room"
    assert list(server.service.store.root.glob("jobs/*")) == []
    monkeypatch.undo()
    server.until(server.post().json()["id"], "completed")
