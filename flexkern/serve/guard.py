"""What every request passes before it reaches the server: who it is for, where it comes from, who sends it.

- A request names the host it is for. One that names another than this server's was led here by a name that somebody
  else's DNS points at this machine, and is refused.
- A page of another origin may make a browser send requests; those name their origin, and are refused. There is no CORS.
- With a token every request needs it, but for the page itself and its health. Tokens are compared in constant time.
"""

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from flexkern.serve.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SHORTEST = 16  # characters of a token
OPEN = ("/", "/page.css", "/page.js", "/chart.js", "/icon.svg", "/health")  # need no token
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def validate_token(token: str) -> str:
    """The token without the space around it. Raises ValueError where it is too short, or cannot stand in a header."""
    token = token.strip()
    if len(token) < SHORTEST:
        raise ValueError(f"a token needs at least {SHORTEST} characters, got {len(token)}")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("a token is made of printable ASCII without spaces")
    return token


class Guard:
    """Stands before an application.

    Args:
        app: The application.
        token: That requests need; None where they need none.
        hosts: Names that this server answers to, in lower case without a port; empty for any.
        refused: Called with a reason for each request that is turned away.
    """

    def __init__(self, app: App, *, token: str | None, hosts: frozenset[str], refused: Callable[[str], None]):
        self._app, self._hosts, self._refused = app, hosts, refused
        self._token = None if token is None else _digest(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let it through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                had = {name for name, _ in message["headers"]}
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in more if pair[0] not in had)]
            await send(message)

        try:
            self._validate(scope)
        except ApiError as error:
            self._refused(error.code)
            await answer(error, with_headers)
            return
        await self._app(scope, receive, with_headers)

    def _validate(self, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self._hosts and _name(host) not in self._hosts:
            raise ApiError(403, "wrong_host", "this server does not answer to the host that the request names")
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2].lower() != host.lower()
        if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise ApiError(403, "wrong_origin", "a page of another origin may not use this server")
        if self._token is None or scope["path"] in OPEN:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        fits = kind.lower() == "bearer" and hmac.compare_digest(_digest(given.strip()), self._token)
        if not fits:
            told = "give the token of this server as Authorization: Bearer TOKEN"
            raise ApiError(401, "wrong_token", told, headers={"WWW-Authenticate": "Bearer"})


async def answer(error: ApiError, send: Send) -> None:
    """Send an error as an answer."""
    body = json.dumps(error.body).encode()
    given: Mapping[str, str] = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    headers = [(name.lower().encode(), value.encode()) for name, value in given.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _name(host: str) -> str:
    """A host without its port, in lower case."""
    if host.startswith("["):
        return host.partition("]")[0].lstrip("[").lower()
    return host.partition(":")[0].lower()


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("latin-1", "replace")).digest()
