r"""Serves predictions over HTTP until it is told to stop.

    solov2-serve --workdir runs/r50
    solov2-serve --config r50_3x --weights r50_3x.safetensors --port 9000
    curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg \
        'http://localhost:8000/predict?score=0.5'

POST /predict answers an image with JSON, or a drawn PNG with `output=png`; GET /docs is
the interface, /healthz the state, /metrics Prometheus' counters, / a page to try it. It
listens on this machine only; --host=0.0.0.0 opens it, behind a proxy that knows whom to
let in. Every program is compiled before it listens.

SIGTERM and SIGINT: no request is taken any more, the ones that are there are answered,
and the exit code is 0; 2: an error that the one line `error: ...` explains.
"""

import dataclasses
import logging
from typing import TYPE_CHECKING

from absl import flags

from solov2_jax.tools.cli import app

if TYPE_CHECKING:
    from solov2_jax.inference.predictor import Predictor

log = logging.getLogger(__name__)

_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a training run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "Of the workdir: last, best or a step.")
_CONFIG = flags.DEFINE_string("config", "", "Config file, with --weights.")
_WEIGHTS = flags.DEFINE_string("weights", "", "Weights file, with --config.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "To listen on; 0: a free one.", 0, 65535)
_BATCH = flags.DEFINE_integer(
    "batch_size", 1, "Most images computed together; above 1 for GPUs.", 1
)
_WAIT = flags.DEFINE_float(
    "batch_wait_ms", 5.0, "How long an image waits for others to join it.", 0
)
_QUEUE = flags.DEFINE_integer(
    "queue", 16, "Requests in progress or waiting; one more is answered 429.", 1
)
_MAX_MB = flags.DEFINE_float("max_mb", 10.0, "Megabytes of a body.", 0.001)
_MAX_MEGAPIXELS = flags.DEFINE_float("max_megapixels", 25.0, "Of an image.", 0.001)
_BODY_SECONDS = flags.DEFINE_float("body_seconds", 30.0, "To send a body.", 0.01)
_HEADER_SECONDS = flags.DEFINE_float(
    "header_seconds", 10.0, "To send a header, and idle between two requests.", 0.01
)
_CONNECTIONS = flags.DEFINE_integer("max_connections", 512, "Open at once; one more is closed.", 1)
_SCORE = flags.DEFINE_float(
    "score", 0.3, "Least score of a detection, unless a request says another.", 0, 1
)


def main(overrides: list[str]) -> None:
    """Serves as the flags say."""
    given = tuple(bool(f.value) for f in (_WORKDIR, _CONFIG, _WEIGHTS))
    if given not in ((True, False, False), (False, True, True)):
        raise ValueError("give either --workdir, or --config and --weights together")
    try:
        from solov2_jax.tools.serving.app import Limits, make_app
        from solov2_jax.tools.serving.server import bind, make_server
    except ModuleNotFoundError as error:
        raise ValueError(
            f'serving needs {error.name}, which is not installed: pip install "solov2_jax[serve]"'
        ) from error
    from solov2_jax.tools.export.metadata import default_buckets
    from solov2_jax.tools.serving.engine import Engine

    sock = bind(_HOST.value, _PORT.value)  # raises now instead of after compiling
    predictor = _load_predictor(overrides)
    shapes = default_buckets(predictor.input)
    predictor.input = dataclasses.replace(predictor.input, buckets=shapes)
    engine = Engine(predictor, shapes, _BATCH.value)
    limits = Limits(
        max_bytes=int(_MAX_MB.value * 1e6),
        max_pixels=int(_MAX_MEGAPIXELS.value * 1e6),
        queue=_QUEUE.value,
        body_seconds=_BODY_SECONDS.value,
        batch_size=_BATCH.value,
        batch_wait=_WAIT.value / 1000,
        score=_SCORE.value,
    )
    server = make_server(
        make_app(engine, limits, _WORKDIR.value or _WEIGHTS.value),
        max_connections=_CONNECTIONS.value,
        header_seconds=_HEADER_SECONDS.value,
    )
    server.run(sockets=[sock])
    log.info("stopped: every request that was taken is answered")


def _load_predictor(overrides: list[str]) -> "Predictor":
    from solov2_jax import Predictor

    if _WORKDIR.value:
        return Predictor.from_workdir(_WORKDIR.value, _CHECKPOINT.value, overrides)
    return Predictor.from_weights(_WEIGHTS.value, _CONFIG.value, overrides)


def run() -> None:
    """Runs the command."""
    app.run(main)
