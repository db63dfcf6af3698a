r"""Serves predictions over HTTP until it is told to stop.

    solov2 serve --workdir runs/r50
    solov2 serve --config r50_3x --weights r50_3x.safetensors --port 9000
    solov2 serve --model runs/r50/export/onnx_float32
    curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg \
        'http://localhost:8000/predict?score=0.5'

POST /predict answers an image with JSON, or a drawn PNG with `output=png`; GET /docs is
the interface, /healthz the state, /readyz whether to send requests, /metrics Prometheus'
counters, / a page to try it. It listens on this machine only; --host=0.0.0.0 opens it,
behind a proxy that knows whom to let in. Every program is compiled before it listens.

SIGTERM and SIGINT: no request is taken any more, the ones that are there are answered,
and the exit code is 0; 2: an error that the one line `error: ...` explains.
"""

import functools
import logging

from solov2_jax.config_schema import number, text, whole
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag

log = logging.getLogger(__name__)

_HOST = Flag("host", text("127.0.0.1"), "Address to listen on.")
_PORT = Flag("port", whole(8000, high=65_535), "Port to listen on; 0 picks a free one.")
_BATCH = Flag("batch_size", whole(1, 1, 4096), "Most images together, on each device.")
_WAIT = Flag("batch_wait_ms", number(5.0, 0, high=60_000), "Time that an image waits for others.")
_QUEUE = Flag("queue", whole(16, 1, 1_000_000), "Most requests at once; one more is answered 429.")
_MAX_MB = Flag("max_mb", number(10.0, 0.001, high=1e6), "Most megabytes of a body.")
_MAX_MEGAPIXELS = Flag(
    "max_megapixels", number(25.0, 0.001, high=1e6), "Most megapixels of an image."
)
_BODY_SECONDS = Flag("body_seconds", number(30.0, 0.01, high=86_400), "Seconds to send a body.")
_HEADER_SECONDS = Flag(
    "header_seconds", number(10.0, 0.01, high=86_400), "Seconds to send a header, or idle."
)
_CONNECTIONS = Flag("max_connections", whole(512, 1, 1_000_000), "Most open ones; more are closed.")
_WRITE_SECONDS = Flag(
    "write_seconds", number(30.0, 0.01, high=86_400), "Seconds to read an answer."
)
FLAGS = (
    *shared.MODEL,
    shared.EXPORT,
    _HOST,
    _PORT,
    shared.SCORE,
    _BATCH,
    _WAIT,
    _QUEUE,
    _MAX_MB,
    _MAX_MEGAPIXELS,
)
FLAGS += (_BODY_SECONDS, _HEADER_SECONDS, _WRITE_SECONDS, _CONNECTIONS)


def main(overrides: list[str]) -> None:
    shared.check_model(exported=(_BATCH,))
    try:
        from solov2_jax.tools.serving.app import Limits, make_app
        from solov2_jax.tools.serving.server import bind, make_server
    except ModuleNotFoundError as error:
        raise InputError(
            f'serving needs {error.name}, which is not installed: pip install "solov2_jax[serve]"'
        ) from error
    from solov2_jax.tools.serving.engine import Engine
    from solov2_jax.tools.serving.exported import ExportedEngine

    if not (pixels := shared.model_pixels(overrides)).is_rgb:
        raise InputError(
            f"serve takes 8-bit RGB pictures, and this network is for {pixels.describe()}; use "
            "predict.py or solov2_jax.Predictor"
        )
    sock = bind(_HOST.value, _PORT.value)  # raises now instead of after compiling
    if shared.EXPORT.value:
        predictor = shared.load_export(overrides)
        engine = ExportedEngine(predictor, predictor.input.buckets, predictor.batch)
    else:
        predictor = shared.on_local_devices(shared.load_predictor(overrides))
        engine = Engine(predictor, predictor.input.buckets, _BATCH.value)
    least = shared.least_scores(predictor)
    limits = Limits(
        max_bytes=int(_MAX_MB.value * 1e6),
        max_pixels=int(_MAX_MEGAPIXELS.value * 1e6),
        queue=_QUEUE.value,
        body_seconds=_BODY_SECONDS.value,
        batch_size=engine.sizes[-1],
        batch_wait=_WAIT.value / 1000,
        score=least,
    )
    name = shared.WORKDIR.value or shared.WEIGHTS.value or shared.EXPORT.value
    server = make_server(
        make_app(engine, limits, name),
        max_connections=_CONNECTIONS.value,
        header_seconds=_HEADER_SECONDS.value,
        write_seconds=_WRITE_SECONDS.value,
    )
    server.run(sockets=[sock])
    log.info("stopped; every accepted request was answered")


run = functools.partial(app.run, main, FLAGS)
