"""The service's routes: an ASGI application around an engine."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi_offline import FastAPIOffline

import solov2_jax
from solov2_jax.tools import html
from solov2_jax.tools.serving.batcher import Batcher, Metrics
from solov2_jax.tools.serving.pictures import TYPES, RequestRefused, check_type, decode

log = logging.getLogger(__name__)

# Of an oversized body, so that its sender reads the answer instead of a broken pipe.
_DISCARD_SECONDS = 2.0
# Bytes of bodies that are on their way, in largest bodies for each place in the queue.
_BODIES = 2


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take."""

    max_bytes: int  # of a body
    max_pixels: int  # of a picture
    queue: int  # requests that are decoded, waiting or computed; more: 429
    body_seconds: float  # to send a body
    batch_size: int
    batch_wait: float  # seconds
    score: float | np.ndarray  # where a request names none; one for all, or of each class [K]


@runtime_checkable
class Answering(Protocol):
    """What the routes need of an `Engine`."""

    class_names: tuple[str, ...]

    def preprocess(
        self, image: np.ndarray, score: float | np.ndarray, limit: int, drawn: bool
    ) -> Any: ...

    def answer(self, jobs: Any) -> Any: ...


class Service:
    """The state behind the routes: admission, decoding threads, the batcher.

    Args:
      decoders: threads that decode and resize; each holds one picture.
    """

    def __init__(self, engine: Answering, limits: Limits, decoders: int = 2):
        self.engine, self.limits, self.metrics = engine, limits, Metrics()
        self.admitted = 0
        self.unread_bytes = 0  # of bodies that are not complete
        self._pool = ThreadPoolExecutor(decoders, thread_name_prefix="decoder")
        self._batcher = Batcher(
            engine.answer, limits.batch_size, limits.batch_wait, self.metrics.observe_batch
        )

    def close(self) -> None:
        """Ends the threads; what was admitted is answered before."""
        self._pool.shutdown()
        self._batcher.close()

    def status(self) -> str:
        """Returns "ready", "busy" where the queue is full, or "broken"."""
        if not self._batcher.is_alive():
            return "broken"
        return "ready" if self.admitted < self.limits.queue else "busy"

    async def predict(
        self, request: Request, output: str, score: float | np.ndarray, limit: int
    ) -> bytes:
        """Returns the body of the answer, or raises `RequestRefused`."""
        check_type(request.headers.get("content-type", ""))
        self._check_queue()  # spares a client the upload; a place is taken when it is done
        body = await self._read(request)
        with self._admission():
            preprocessing = self._pool.submit(self._preprocess, body, score, limit, output == "png")
            del body
            job = await asyncio.wrap_future(preprocessing)
            return await asyncio.wrap_future(self._batcher.submit(job))

    def _preprocess(self, body: bytes, score: float | np.ndarray, limit: int, drawn: bool) -> Any:
        image = decode(body, self.limits.max_pixels)
        return self.engine.preprocess(image, score, limit, drawn)

    def _check_queue(self) -> None:
        if self.admitted >= self.limits.queue:
            raise RequestRefused(
                429,
                f"{self.admitted} requests are being answered, the most this service "
                "takes: try again",
                retry_after=1,
            )

    @contextlib.contextmanager
    def _admission(self) -> Any:
        self._check_queue()
        self.admitted += 1
        self.metrics.admitted.set(self.admitted)
        try:
            yield
        finally:
            self.admitted -= 1
            self.metrics.admitted.set(self.admitted)

    async def _read(self, request: Request) -> bytes:
        most = self.limits.max_bytes
        too_large = RequestRefused(413, f"the body has more than {most} bytes: shrink the image")
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                declared = request.headers.get("content-length", "0")
                if int(declared) > most:
                    raise too_large
                async for part in request.stream():
                    body += part
                    self.unread_bytes += len(part)
                    if len(body) > most:
                        raise too_large
                    if self.unread_bytes > _BODIES * most * self.limits.queue:
                        raise RequestRefused(429, "too many bodies at once: try again", 1)
        except TimeoutError:
            raise RequestRefused(
                408, f"the body took longer than {self.limits.body_seconds:g} s"
            ) from None
        except RequestRefused:
            await _discard(request)
            raise
        finally:
            self.unread_bytes -= len(body)
        if not body:
            raise RequestRefused(400, "the body is empty: send an image's bytes")
        return bytes(body)


async def _discard(request: Request) -> None:
    """Reads on for a moment without keeping anything."""
    with contextlib.suppress(TimeoutError, RuntimeError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for _ in request.stream():
                pass


def _add_refusals_and_counts(app: FastAPI, service: Service) -> None:
    @app.exception_handler(RequestRefused)
    async def refuse(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestRefused)
        headers = {}
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        if error.status in (408, 413):
            headers["Connection"] = "close"  # the rest of the body is not read
        return JSONResponse({"error": error.message}, error.status, headers)

    @app.middleware("http")
    async def count(request: Request, call_next: Any) -> Response:
        start = time.perf_counter()
        status = 500
        try:
            response = await call_next(request)
            status = response.status_code
            return response
        finally:
            if request.url.path == "/predict":
                service.metrics.requests.labels(str(status)).inc()
                service.metrics.seconds.observe(time.perf_counter() - start)


def make_app(engine: Answering, limits: Limits, model: str) -> FastAPI:
    """Returns the application.

    Args:
      model: what is served, for people.
    """
    service = Service(engine, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPIOffline(
        title="SOLOv2 instance segmentation",
        # Nothing of the model's: its viewers render descriptions as Markdown with HTML.
        description="Finds the objects of an image; `/classes` lists their classes.",
        redoc_url=None,
        version=solov2_jax.__version__,
        lifespan=lifespan,
    )

    _add_refusals_and_counts(app, service)
    one_score = float(limits.score) if np.ndim(limits.score) == 0 else None
    default = one_score if one_score is not None else "of each class, the best on validation"

    @app.post("/predict", openapi_extra=_BODY, responses=_RESPONSES)
    async def predict(
        request: Request,
        output: Annotated[
            Literal["json", "png"], Query(description="Masks as JSON, or a picture.")
        ] = "json",
        score: Annotated[
            float | None,
            Query(ge=0, le=1, description=f"Least score of a detection. Default: {default}."),
        ] = one_score,
        limit: Annotated[int, Query(ge=1, le=10_000, description="Most detections.")] = 100,
    ) -> Response:
        """Finds the objects of one image, whose bytes are the body.

        JSON: `height` and `width` of the upright image, and `detections`, best first:
        `class_name`, `category_id`, `score`, `bbox` (x, y, width, height), and
        `segmentation`, the mask in COCO's compressed run lengths. PNG: the picture with
        the masks drawn, its long side at most 1600 pixels.
        """
        least = limits.score if score is None else score
        body = await service.predict(request, output, least, limit)
        kind = "image/png" if output == "png" else "application/json"
        return Response(body, media_type=kind)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """Tells whether requests are answered, and how many are being."""
        broken = service.status() == "broken"
        state = {"status": "broken" if broken else "ok", "admitted": service.admitted}
        return JSONResponse({**state, "model": model}, 503 if broken else 200)

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Tells whether to send requests: 200 where there is room, else 503."""
        status = service.status()
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/classes")
    async def classes() -> JSONResponse:
        """Lists the names of the classes, in the order of their labels."""
        return JSONResponse({"classes": list(engine.class_names)})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters and times in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=Metrics.CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html.render("serve.html", score="" if one_score is None else one_score))

    return app


_BODY = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in TYPES},
    }
}


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The detections.", "content": {"application/json": {}, "image/png": {}}},
    400: {"description": "The image is damaged, or the body empty."},
    408: {"description": "The body came too slowly."},
    413: {"description": "Too many bytes or pixels."},
    415: {"description": "No image of a known kind."},
    429: {"description": "Too many requests at once: try again after `Retry-After` seconds."},
}
