"""A server from its settings: a folder that is this process's alone, a port, and an end in good order."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from flexkern.checks import require
from flexkern.render.checkpoint import EVERY
from flexkern.render.spec import JobSpec
from flexkern.serve.app import make_app
from flexkern.serve.child import worker_command
from flexkern.serve.guard import Guard, validate_token
from flexkern.serve.served import Served
from flexkern.serve.service import Service
from flexkern.serve.store import Store

GRACE = 5  # seconds that connections have to end
LOCAL = frozenset(("localhost", "127.0.0.1", "::1"))
CONNECTIONS = 512  # at a time
BACKLOG = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Where a server answers, and to whom.

    Raises:
        ValueError: The port is out of range, the token will not do, or the host is open to others and there is none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    """0 for any that is free"""
    token: str | None = None
    """that requests need"""
    open: bool = False
    """whether others may come in without a token"""

    def __post_init__(self) -> None:
        require(0 <= self.port < 1 << 16, f"a port must be 0 to 65535, got {self.port}")
        if self.token is not None:
            object.__setattr__(self, "token", validate_token(self.token))
        if self.token is None and not self.open and not self.is_local:
            raise ValueError(f"{self.host} can be reached from other machines: give a token, or allow all of them in")

    @property
    def is_local(self) -> bool:
        """Whether this machine alone can reach it."""
        try:
            return all(ipaddress.ip_address(address[4][0]).is_loopback for address in _addresses(self.host, self.port))
        except OSError as error:
            raise ValueError(f"there is no host {self.host!r} to listen at: {error}") from None

    @property
    def names(self) -> frozenset[str]:
        """The hosts that requests may name; empty where any will do, for it is a token that keeps the others out."""
        return LOCAL | {self.host.lower()} if self.is_local else frozenset()

    def bind(self) -> socket.socket:
        """A socket that listens. Raises OSError where the port is taken."""
        family, kind, protocol, _, address = _addresses(self.host, self.port)[0]
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            opened.listen(BACKLOG)
        except OSError as error:
            opened.close()
            raise OSError(error.errno, error.strerror, f"{self.host}:{self.port}") from None
        return opened


def _addresses(host: str, port: int) -> Sequence[Any]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class Uvicorn(uvicorn.Server):
    """uvicorn, which lets connections that follow go before it waits for the others."""

    def __init__(self, config: uvicorn.Config, ending: Callable[[], None]):
        super().__init__(config)
        self._ending = ending

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and wait for those that are being answered."""
        self._ending()
        await super().shutdown(sockets)


def run_server(
    served: Served,
    root: Path,
    door: Door,
    *,
    check: Callable[[JobSpec], None],
    devices: Sequence[str | None] = (None,),
    threads: int = 0,
    every: float = EVERY,
    commands: list[list[str]] | None = None,
    tell: Callable[[str], None],
    up: Callable[[str], None],
) -> None:
    """Answer until a signal comes, SIGTERM or that of Ctrl-C; renders stop at the end of a chunk then.

    Args:
        served: The model.
        root: The folder of the videos.
        door: Where to listen.
        check: Raises what is wrong with a job.
        devices: A worker for each.
        threads: Of torch, in each worker.
        every: Seconds between two checkpoints of a video.
        commands: What starts the workers, in place of flexkern's own.
        tell: Hears what the user should know.
        up: Called with the address once requests are taken.

    Raises:
        BlockingIOError: Another server has the folder.
        OSError: The port is taken, or the folder cannot be written.
    """
    listening = door.bind()
    with listening:
        store = Store(root=root, tell=tell)
        try:
            usual = [worker_command(root, i, device=one, threads=threads, every=every) for i, one in enumerate(devices)]
            service = Service(served, store, check=check, commands=commands or usual, tell=tell)
            app = make_app(service, token=door.token, hosts=door.names)
            with ending_with_signals() as end:
                asyncio.run(answer(app, service, listening, door, up=up, begun=end))
        finally:
            store.close()


async def answer(
    app: Guard,
    service: Service,
    listening: socket.socket,
    door: Door,
    *,
    up: Callable[[str], None],
    begun: Callable[[uvicorn.Server], None],
) -> None:
    """Answer until the server that ``begun`` gets is told to end."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, date_header=True, lifespan="on",
        timeout_graceful_shutdown=GRACE, limit_concurrency=CONNECTIONS, proxy_headers=False,
    )  # fmt: skip
    server = Uvicorn(config, ending=service.hub.close)
    begun(server)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        up(f"http://{_shown(door.host)}:{listening.getsockname()[1]}/")
    await serving


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@contextmanager
def ending_with_signals() -> Iterator[Callable[[uvicorn.Server], None]]:
    """SIGTERM and Ctrl-C end the server that is handed in, also before it takes signals itself, and nothing else."""
    servers: list[uvicorn.Server] = []
    came: list[int] = []

    def take(number: int, _: FrameType | None) -> None:
        came.append(number)
        for server in servers:
            server.should_exit = True

    def begun(server: uvicorn.Server) -> None:
        servers.append(server)
        server.should_exit = bool(came)

    before = {number: signal.signal(number, take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield begun
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
