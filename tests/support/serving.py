"""Servers to ask: real ones, on a free port of this machine, whose workers are stand-ins or render a tiny model."""

import asyncio
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import stand_in_worker

from flexkern.demo import family
from flexkern.render import JobSpec
from flexkern.serve.app import make_app
from flexkern.serve.served import Limits, Served
from flexkern.serve.server import Door, answer
from flexkern.serve.service import Service
from flexkern.serve.store import Store

TOKEN = "a-token-of-more-than-sixteen-characters"


def check(spec):
    """What a worker says of a job beforehand."""
    if spec.prompt == "what the model does not know":
        raise ValueError("the model knows other prompts")


def stand_in(root, index=0, *more):
    return [sys.executable, stand_in_worker.__file__, str(root), str(index), *more]


class Running:
    """A server that answers."""

    def __init__(self, service, address, token):
        self.service, self.address = service, address
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = httpx.Client(base_url=address, headers=headers, timeout=20)

    def post(self, prompt="a", **more):
        return self.client.post("/v1/videos", json={"prompt": prompt, "frames": 16} | more)

    def get(self, identity):
        return self.client.get(f"/v1/videos/{identity}").json()

    def until(self, identity, *statuses, patience=20):
        """The video, once it has one of these statuses."""
        end = time.monotonic() + patience
        while (video := self.get(identity))["status"] not in statuses:
            assert time.monotonic() < end, f"still {video}"
            time.sleep(0.01)
        return video


@contextmanager
def serving(root, *, limits=None, token=None, commands=None, door=None, said=None):
    """A server of the folder, in a thread of its own."""
    served = Served(base=JobSpec(), family=family(), limits=limits or Limits(), example="a")
    door = door or Door(port=0, token=token)
    tell = (said if said is not None else []).append
    store = Store(root=root, tell=tell)
    service = Service(served, store, check=check, commands=commands or [stand_in(root)], tell=tell)
    addresses, servers, ready = [], [], threading.Event()

    def up(address):
        addresses.append(address)
        ready.set()

    def live():
        async def main():
            app = make_app(service, token=door.token, hosts=door.names)
            with door.bind() as listening:
                await answer(app, service, listening, door, up=up, begun=servers.append)

        try:
            asyncio.run(main())
        finally:
            ready.set()

    thread = threading.Thread(target=live)
    thread.start()
    ready.wait(20)
    running = Running(service, addresses[0], token)
    try:
        yield running
    finally:
        running.client.close()
        servers[0].should_exit = True
        thread.join(30)
        store.close()
        assert not thread.is_alive()
