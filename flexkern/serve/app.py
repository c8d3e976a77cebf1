"""The server's HTTP: the Videos API, what we add to it, the page and the figures.

Handlers only ask the store and the queue; renders run in other processes. What touches the disk or checks a job runs in
a thread, so that the others are answered meanwhile.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from flexkern import __version__
from flexkern.policies import PRESETS
from flexkern.render.encoding import exact_rate
from flexkern.serve import shapes
from flexkern.serve.describe import sse
from flexkern.serve.errors import ApiError
from flexkern.serve.forms import read_request
from flexkern.serve.guard import Guard
from flexkern.serve.hub import Lost, Message, Reader
from flexkern.serve.openapi import CREATE, answers, finished_schema
from flexkern.serve.places import PREVIEW, THUMBNAIL, VIDEO
from flexkern.serve.service import Service
from flexkern.serve.stream import Growing
from flexkern.serve.telemetry import CONTENT_TYPE

QUIET = 15.0  # seconds without a message, after which a connection is told that it is still there
LATE = 30.0  # seconds that a body may take to come
LOOK = 0.2  # seconds between two looks at a growing video
PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/chart.js": "chart.js"}
PAGE |= {"/icon.svg": "icon.svg"}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
NO_STORE = {"Cache-Control": "no-store"}
EVENTS = "text/event-stream"


def make_app(service: Service, *, token: str | None = None, hosts: frozenset[str] = frozenset()) -> Guard:
    """The application, which makes videos as long as it is up.

    Args:
        service: What it answers from.
        token: That requests need; None where they need none.
        hosts: Names that it answers to; empty for any.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.runner.start()
        yield
        service.hub.close()
        await asyncio.to_thread(service.runner.stop)

    about = "Videos of any length from autoregressive diffusion models."
    app = FastAPI(
        title="flexkern", version=__version__, description=about, lifespan=life, docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    _handle_errors(app)
    _add_videos(app, service)
    _add_content(app, service)
    _add_events(app, service)
    _add_rest(app, service)
    app.openapi = lambda: finished_schema(app, needs_token=token is not None)  # type: ignore[method-assign]
    return Guard(app, token=token, hosts=hosts, refused=service.telemetry.refused)


def _handle_errors(app: FastAPI) -> None:
    """Every error has the API's form."""

    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])[:100]
        problem = ApiError(400, "invalid_value", f"{name}: {first['msg']}", param=name)
        return JSONResponse(problem.body, problem.status)

    @app.exception_handler(HTTPException)
    async def usual(_: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "wrong_method"}.get(error.status_code, "invalid_request")
        problem = ApiError(error.status_code, code, str(error.detail))
        return JSONResponse(problem.body, problem.status, headers=error.headers)

    @app.exception_handler(FileNotFoundError)
    async def gone(_: Request, __: FileNotFoundError) -> Response:  # between a look at it and its being read
        problem = ApiError(404, "not_found", "the file has just gone")
        return JSONResponse(problem.body, problem.status)

    @app.exception_handler(Exception)
    async def fault(_: Request, __: Exception) -> Response:
        problem = ApiError(500, "fault", "a fault of the server; its log has more")
        return JSONResponse(problem.body, problem.status)


def _add_videos(app: FastAPI, service: Service) -> None:
    """The Videos API but for files, and cancelling."""
    create = answers(400, 408, 413, 415, 429, 503, 507)

    @app.post("/v1/videos", response_model=shapes.Video, responses=create, openapi_extra=CREATE, tags=["videos"])
    async def create_video(request: Request) -> shapes.Video:
        """Have a video made. It waits until its turn comes."""
        body = await _body(request, service.limits.body)
        asked = read_request(body, request.headers.get("content-type", ""))
        return await asyncio.to_thread(service.create, asked)

    @app.get("/v1/videos", response_model=shapes.VideoList, responses=answers(400, 404), tags=["videos"])
    async def list_videos(
        after: Annotated[str | None, Query(max_length=100)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> shapes.VideoList:
        """The videos by time of creation; after is the last id of the page before."""
        jobs, more = service.store.page(after=after, limit=limit, newest_first=order == "desc")
        data = [service.told(job) for job in jobs]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return shapes.VideoList(data=data, has_more=more, first_id=first, last_id=last)

    @app.get("/v1/videos/{video_id}", response_model=shapes.Video, responses=answers(404), tags=["videos"])
    async def retrieve_video(video_id: str) -> shapes.Video:
        """A video, and how far it is."""
        return service.told(service.store.get(video_id))

    @app.delete("/v1/videos/{video_id}", response_model=shapes.VideoDeleted, responses=answers(404), tags=["videos"])
    async def delete_video(video_id: str) -> shapes.VideoDeleted:
        """Remove a video and its files; one that is being made is stopped."""
        return await asyncio.to_thread(service.delete, video_id)

    @app.post(
        "/v1/videos/{video_id}/cancel", response_model=shapes.Video, responses=answers(404, 409), tags=["extensions"]
    )
    async def cancel_video(video_id: str) -> shapes.Video:
        """Stop a video, which then counts as failed with the code cancelled."""
        return await asyncio.to_thread(service.cancel, video_id)


def _add_content(app: FastAPI, service: Service) -> None:
    """Files of a video, whole or while they grow."""
    binary = {"type": "string", "format": "binary"}
    kinds = {"video/mp4": {"schema": binary}, "image/jpeg": {"schema": binary}}
    found: dict[int | str, dict[str, Any]] = {200: {"content": kinds}, 206: {"content": kinds, "description": "A part"}}

    @app.get(
        "/v1/videos/{video_id}/content", response_class=FileResponse, responses=found | answers(400, 404, 416),
        tags=["videos"],
    )  # fmt: skip
    async def download_video(video_id: str, variant: Literal["video", "thumbnail", "preview"] = "video") -> Response:
        """The MP4, a small picture of it, or, while it is made, its newest picture."""
        job = service.store.get(video_id)
        name = {"video": VIDEO, "thumbnail": THUMBNAIL, "preview": PREVIEW}[variant]
        path = service.store.file(video_id, name)
        if (variant != "preview" and job.status != "completed") or not path.is_file():
            told = f"the video is {job.status}, and has no {variant}" + ("" if job.over else " yet")
            raise ApiError(404, "not_ready", told, param="variant")
        headers = {"Content-Disposition": f'inline; filename="{video_id}{path.suffix}"', **NO_STORE}
        if variant != "video":  # small, and a preview is replaced while it is sent
            return Response(path.read_bytes(), media_type="image/jpeg", headers=headers)
        return FileResponse(path, media_type="video/mp4", headers=headers, stat_result=path.stat())

    film: dict[int | str, dict[str, Any]] = {200: {"content": {"video/mp4": {"schema": binary}}}}

    @app.get(
        "/v1/videos/{video_id}/stream", response_class=StreamingResponse, responses=film | answers(404, 409, 429),
        tags=["extensions"],
    )  # fmt: skip
    async def stream_video(video_id: str) -> StreamingResponse:
        """The MP4 as it is made, to be played at once: each finished segment of two seconds is sent."""
        job = service.store.get(video_id)
        if job.status == "failed":
            raise ApiError(409, "over", "the video has failed", param="video_id")
        rate = exact_rate(job.spec.get("encoding", {}).get("fps") or job.rate)
        parts = _growing(service, video_id, Growing(service.store.file(video_id, VIDEO), rate=rate))
        return _streamed(service, parts, "video/mp4")


async def _growing(service: Service, video_id: str, growing: Growing) -> AsyncGenerator[bytes, None]:
    try:
        while not service.hub.closed:
            try:
                over = service.store.get(video_id).over
                data = await asyncio.to_thread(growing.more, over=over)
            except (ApiError, OSError):  # it was deleted
                return
            if data is None:
                return
            if data:
                yield data
            elif not over:
                await asyncio.sleep(LOOK)
    finally:
        growing.close()


def _add_events(app: FastAPI, service: Service) -> None:
    """Server-sent events."""
    text: dict[int | str, dict[str, Any]] = {200: {"content": {EVENTS: {"schema": {"type": "string"}}}}}

    @app.get("/v1/events", response_class=StreamingResponse, responses=text | answers(429), tags=["extensions"])
    async def follow_all() -> StreamingResponse:
        """What happens to all videos: video, chunk and deleted, each with JSON."""
        return _streamed(service, _all_events(service), EVENTS)

    @app.get(
        "/v1/videos/{video_id}/events", response_class=StreamingResponse, responses=text | answers(404, 429),
        tags=["extensions"],
    )  # fmt: skip
    async def follow_video(video_id: str) -> StreamingResponse:
        """What happened and happens to a video, until it is over: video, chunk and deleted, each with JSON."""
        service.store.get(video_id)
        return _streamed(service, _events_of(service, video_id), EVENTS)


async def _all_events(service: Service) -> AsyncGenerator[bytes, None]:
    async with service.hub.reading(lambda _: True) as reader:
        yield b": follows\n\n"
        async for message in _messages(reader):
            yield b": still there\n\n" if message is None else sse(*message)


async def _messages(reader: Reader) -> AsyncGenerator[Message | None, None]:
    """What a reader is told, until the end or until it has missed something; None where it has been quiet for long."""
    while True:
        try:
            message = await reader.next(QUIET)
        except asyncio.TimeoutError:
            yield None
            continue
        except Lost:
            return
        if message is None:
            return
        yield message


async def _events_of(service: Service, video_id: str) -> AsyncGenerator[bytes, None]:
    wanted = lambda message: message[1]["id"] == video_id
    async with service.hub.reading(wanted) as reader:
        job = service.store.get(video_id)
        history = await asyncio.to_thread(service.history, video_id)
        made = 0
        yield sse("video", service.told(job).model_dump())
        for event in history:
            made = max(made, event.get("made", 0))
            yield sse("chunk", event)
        if job.over:
            return
        async for message in _messages(reader):
            if message is None:
                yield b": still there\n\n"
                continue
            kind, content = message
            if kind == "chunk" and content.get("made", 0) <= made:
                continue  # it was in the log already
            yield sse(kind, content)
            if kind == "deleted" or (kind == "video" and content["status"] in ("completed", "failed")):
                return


def _add_rest(app: FastAPI, service: Service) -> None:
    """The model, health, figures, and the page."""
    served = service.served

    @app.get("/v1/models", response_model=shapes.ModelList, responses=answers(), tags=["extensions"])
    async def list_models() -> shapes.ModelList:
        """The one model of this server, and what may be asked of it."""
        card = shapes.ModelCard(
            id=served.name, preset=served.preset, presets=sorted(PRESETS), size=served.size, fps=served.family.fps,
            max_seconds=service.limits.seconds, example=served.example,
        )  # fmt: skip
        return shapes.ModelList(data=[card])

    @app.get("/health", response_model=shapes.Health, openapi_extra={"x-open": True}, tags=["extensions"])
    async def health() -> shapes.Health:
        """Whether videos are being made. Needs no token."""
        counts, states = service.store.counts(), service.runner.states
        well = all(state in ("idle", "busy", "starting") for state in states)
        told = [state.partition(":")[0] for state in states]  # why not is for the log, not for everybody
        return shapes.Health(
            status="ok" if well else "degraded",
            queued=counts["queued"],
            in_progress=counts["in_progress"],
            workers=told,
        )

    figures: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=Response, responses=figures | answers(), tags=["extensions"])
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.telemetry.text(), media_type=CONTENT_TYPE)

    for path, name in PAGE.items():
        _add_file(app, path, name)


def _add_file(app: FastAPI, path: str, name: str) -> None:
    content = (files("flexkern.serve") / "page" / name).read_bytes()
    kind = TYPES[name.rpartition(".")[2]]

    @app.get(path, include_in_schema=False)
    async def page() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})


def _streamed(service: Service, parts: AsyncGenerator[bytes, None], kind: str) -> StreamingResponse:
    """An answer that goes on. Raises ApiError where as many do as may."""
    if service.streams >= service.limits.streams:
        service.telemetry.refused("streams_full")
        told = f"{service.streams} connections follow already, which is as many as may"
        raise ApiError(429, "streams_full", told, headers={"Retry-After": "10"})

    async def counted() -> AsyncIterator[bytes]:
        service.streams += 1
        try:
            async with aclosing(parts):
                async for part in parts:
                    yield part
        finally:
            service.streams -= 1

    return StreamingResponse(counted(), media_type=kind, headers=NO_STORE)


async def _body(request: Request, most: int) -> bytes:
    """The body of a request. Raises ApiError where it is too large, or does not come."""
    large = ApiError(413, "too_large", f"a request may have {most} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise large
    got = bytearray()

    async def read() -> None:
        async for part in request.stream():
            got.extend(part)
            if len(got) > most:
                raise large

    try:
        await asyncio.wait_for(read(), LATE)
    except asyncio.TimeoutError:
        raise ApiError(408, "too_slow", f"the body did not come within {LATE:g} seconds") from None
    return bytes(got)
