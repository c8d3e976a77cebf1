"""What follows: server-sent events, a video that is sent while it grows, and what readers are told in time."""

import asyncio
import io
import json
import threading

import pytest

pytest.importorskip("fastapi", reason='needs pip install "flexkern[serve]"')
pytest.importorskip("httpx", reason='needs pip install "flexkern[test]"')

import small_render
from serving import Limits, serving

from flexkern.render import prepare
from flexkern.render.target import parts_name
from flexkern.render.writer import load_av
from flexkern.serve.describe import read_log
from flexkern.serve.hub import BACKLOG, Hub, Lost
from flexkern.serve.stream import Growing


def events_of(lines):
    """Kind and content of each event of a stream."""
    kind = None
    for line in lines:
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def test_a_video_is_followed_from_its_beginning_to_its_end(server):
    identity = server.post("a", frames=40).json()["id"]
    with server.client.stream("GET", f"/v1/videos/{identity}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        heard = list(events_of(answer.iter_lines()))
    assert heard[0][0] == "video" and heard[-1][1]["status"] == "completed"
    assert [content["made"] for kind, content in heard if kind == "chunk"] == [8, 16, 24, 32, 40]
    assert {content["id"] for _, content in heard} == {identity}
    again = list(events_of(server.client.get(f"/v1/videos/{identity}/events").text.splitlines()))
    assert [content["made"] for kind, content in again if kind == "chunk"] == [8, 16, 24, 32, 40]


def test_all_videos_are_followed_at_once(server):
    heard, ready = [], threading.Event()

    def listen():
        with server.client.stream("GET", "/v1/events") as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith(":")
            ready.set()
            for kind, content in events_of(lines):
                heard.append((kind, content["id"], content.get("status")))
                if kind == "deleted":
                    return

    thread = threading.Thread(target=listen)
    thread.start()
    ready.wait(10)
    identity = server.post("a").json()["id"]
    server.until(identity, "completed")
    server.client.delete(f"/v1/videos/{identity}")
    thread.join(10)
    statuses = [status for kind, _, status in heard if kind == "video"]
    assert statuses[0] == "queued" and "in_progress" in statuses and statuses[-1] == "completed"
    assert heard[-1][0] == "deleted" and {one for _, one, _ in heard} == {identity}


def test_as_many_follow_as_may(tmp_path):
    with serving(tmp_path, limits=Limits(streams=1)) as server:
        with server.client.stream("GET", "/v1/events") as answer:
            lines = answer.iter_lines()  # which would close the connection, were it let go
            assert next(lines).startswith(":")
            refused = server.client.get("/v1/events")
            assert refused.status_code == 429 and refused.headers["Retry-After"] == "10"
        identity = server.post("a").json()["id"]
        server.until(identity, "completed")
        assert server.client.get(f"/v1/videos/{identity}/events").status_code == 200


def test_a_reader_that_is_too_slow_begins_again():
    async def main():
        hub = Hub()
        async with hub.reading(lambda _: True) as reader:
            for number in range(BACKLOG + 1):
                hub.publish("chunk", {"number": number})
            assert hub.readers == 1
            await asyncio.sleep(0)
            with pytest.raises(Lost):
                await reader.next(1)
        assert hub.readers == 0

    asyncio.run(main())


def test_a_log_that_a_kill_has_torn_is_read_but_for_that(tmp_path):
    log = tmp_path / "events.jsonl"
    log.write_text('{"event": "chunk", "made": 1}\n{"event": "ch{"event": "chunk", "made": 2}\n3\n{"event"')
    assert [event["made"] for event in read_log(log)] == [1]
    assert list(read_log(tmp_path / "nothing")) == []


def numbers(content):
    """What the pictures of a film are, by the mean of each, and when they are shown."""
    with load_av().open(io.BytesIO(content)) as film:
        return [(round(float(one.pts * one.time_base * 16)), one.to_ndarray()[:8].mean()) for one in film.decode(0)]


@pytest.mark.parametrize("looks", [1, 3, 40, 1000])
def test_a_video_that_is_read_while_it_grows_has_every_picture_once(tmp_path, looks):
    """Looked at after every so-many-th chunk; the last look sees the whole file, the others its segments."""
    target = tmp_path / "film.mp4"
    growing, got, chunks = Growing(target, rate=16), [], []

    def after(_):
        chunks.append(0)
        if len(chunks) % looks == 0:
            got.append(growing.more(over=False))

    job = prepare(small_render.small_order(target), small_render.small_engine(), small_render.small_family(), every=0)
    keep = job.checkpoints.take
    job.checkpoints.take = lambda *given, **named: (keep(*given, **named), after(0))
    job.run(progress=False)
    assert not parts_name(target).exists()
    while (data := growing.more(over=True)) is not None:
        got.append(data)
    if looks == 1:
        assert sum(map(bool, got[:-1])) >= 2  # some of it came before the end
    whole = numbers(target.read_bytes())
    assert numbers(b"".join(got)) == whole and len(whole) == small_render.PICTURES


def test_of_a_video_that_failed_there_is_what_was_made(tmp_path):
    growing = Growing(tmp_path / "film.mp4", rate=16)
    assert growing.more(over=False) == b""
    assert growing.more(over=True) == b"" and growing.more(over=True) is None
    growing.close()


def test_a_video_is_streamed_while_it_is_made(server):
    identity = server.post("a", frames=100).json()["id"]
    with server.client.stream("GET", f"/v1/videos/{identity}/stream") as answer:
        assert answer.headers["content-type"] == "video/mp4"
        content = answer.read()
    assert len(numbers(content)) == 100
    failed = server.post("it fails").json()["id"]
    server.until(failed, "failed")
    assert server.client.get(f"/v1/videos/{failed}/stream").status_code == 409
