"""``flexkern render --metrics-port``: figures while a video is made, and nothing afterwards."""

import socket
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest

pytest.importorskip("prometheus_client", reason='needs pip install "flexkern[serve]"')

from flexkern.serve.telemetry import Telemetry
from flexkern.session import Session

WRITTEN = (  # by a thread, while the third chunk waits to be made
    'flexkern:pictures_total{model_name="demo"} 6.0',
    'flexkern:stage_latency_seconds_count{model_name="demo",stage="encode"} 2.0',
)


def test_figures_are_told_while_a_video_is_made(flexkern_, monkeypatch):
    ports, told, step, serve = [], [], Session.step, Telemetry.serve

    def serving(self, port):
        found = serve(self, port)
        ports.append(found[0])
        return found

    def stepping(session):
        until = time.monotonic() + 20
        while session.chunks == 2 and not (told and all(line in told[-1] for line in WRITTEN)):
            assert time.monotonic() < until, told[-1]
            told.append(urlopen(f"http://127.0.0.1:{ports[0]}/metrics").read().decode())
        return step(session)

    monkeypatch.setattr(Telemetry, "serve", serving)
    monkeypatch.setattr(Session, "step", stepping)
    status, _, said = flexkern_("render", "--frames", "9", "--out", "a.mp4", "--metrics-port", "0", "--no-progress")
    assert status == 0 and f"figures for Prometheus at http://127.0.0.1:{ports[0]}/metrics" in said
    assert all(line in told[-1] for line in WRITTEN)
    with pytest.raises(URLError):
        urlopen(f"http://127.0.0.1:{ports[0]}/metrics")


def test_a_port_that_is_taken_is_refused_before_any_work(flexkern_):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, said = flexkern_("render", "--frames", "3", "--out", "a.mp4", "--metrics-port", port)
    assert status == 2 and "Address already in use" in said and len(said.strip().splitlines()) <= 2
