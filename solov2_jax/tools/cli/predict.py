r"""Predicts objects in images and videos: overlays, `predictions.json`, masks, labels.

    solov2 predict --workdir runs/r50 --input photos/ --output outputs/
    solov2 predict --config configs/r50_3x.py --weights r50_3x.npz \
        --input 'photos/*.jpg' --output outputs/ --score 0.5 --classes person,dog
    solov2 predict --model runs/r50/export/onnx_float32 --input photos --output outputs
    solov2 predict --workdir runs/r50 --input clip.mp4 --output outputs/ --track
    solov2 predict --workdir runs/r50 --input camera:0 --output outputs/ --frames 500
    solov2 predict --workdir runs/r50 --input photos/ --output outputs/ \
        --write overlay,masks,cutouts,yolo,labelme

The results are those of each image padded to its own multiples of 32, as the reference
does with one image, in at most two compiled shapes that hold them all (`--shapes`).
`--tile 512` cuts large images into overlapping
tiles, `--tta flip,0.8,1,1.25` averages several views. `--score 0` keeps every detection
that the network's own thresholds (`--config.test.*`) let through.

Started as several processes (`--num_processes`, Slurm, ...) each predicts and writes a part
of the image files; the first one writes the files about all of them. What must be read in
order (a video, a camera, an address) goes with one process.

Other files in the output folder are never replaced or deleted without --overwrite.
SIGINT (Ctrl-C) and SIGTERM end the reading; what was read is finished and written.

Exit code 0: done; 1: some images, frames or pages could not be read or written, which the
line `error: ...` names, and the others are done; 2: an error, before the first picture or
one that ends the run, such as a full disk (what was done is written); 130 and 143: ended
by SIGINT or SIGTERM (a camera that is ended by Ctrl-C: 0).
"""

import functools
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from solov2_jax.config_schema import choice, number, several, switch, text, whole
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag

if TYPE_CHECKING:
    from solov2_jax.data.buckets import Bucket
    from solov2_jax.inference.predictor import Predictor
    from solov2_jax.tools.predict.predict_files import FileOptions, Summary
    from solov2_jax.tools.predict.sources import Size, Source

_INPUT = Flag(
    "input",
    text(),
    "An image, a video, a folder, a quoted pattern, an http(s) or rtsp address, or camera:0.",
    required=True,
)
_OUTPUT = Flag("output", text(), "Folder to write to.", required=True)
_WRITE = Flag(
    "write",
    several(("overlay", "coco"), text()),
    "What is written: overlay (pictures, videos), coco (predictions.json), masks, cutouts (a "
    "PNG per object); yolo, labelme, cvat, label_studio (labels to correct by hand).",
)
_CLASSES = Flag("classes", several((), text()), "Only these: names or category ids.")
_MAX = Flag("max", whole(0), "Most detections per image, best first. 0: all.")
_HIDE_LABELS = Flag("hide_labels", switch(False), "Overlays without text.")
_COLOR_BY = Flag(
    "color_by",
    choice("object", ("object", "class", "track")),
    "What keeps its colour. Default: track with --track, else object.",
    optional=True,
)
_TRACK = Flag("track", switch(False), "Follow objects from frame to frame and number them.")
_BATCH_SIZE = Flag("batch_size", whole(1, 1, 4096), "Images of one shape per batch and device.")
_SHAPES = Flag(
    "shapes",
    whole(2, high=10_000),
    "Most padded shapes, a program each; they change no result. 0: each image's own.",
)
_FRAMES = Flag("frames", whole(0), "Most frames of a video or camera. 0: all.")
_EVERY = Flag("every", whole(1, 1), "Of a video or camera: use every Nth frame.")
_READERS = Flag("readers", whole(2, 1, 1024), "Threads that read and resize images.")
_OVERWRITE = Flag("overwrite", switch(False), "Replace files that this command did not write.")
_MAX_PIXELS = Flag(
    "max_pixels",
    whole(89_478_485, 1, 10**12),
    "Most pixels of an image or frame; raise it for large images that you trust, with --tile. "
    "Default: Pillow's limit, 89 million.",
    optional=True,
)
_DOWNLOAD_MB = Flag("download_mb", number(1000.0, 0.001, high=1e9), "Most megabytes to fetch.")
_SECONDS = Flag("download_seconds", number(600.0, 0.01, high=1e7), "Most seconds to fetch a file.")
FLAGS = (
    *shared.MODEL,
    shared.EXPORT,
    _INPUT,
    _OUTPUT,
    _WRITE,
    shared.SCORE,
    _CLASSES,
    _MAX,
    *shared.VIEWS,
)
FLAGS += (_SHAPES, _BATCH_SIZE, _TRACK, _COLOR_BY, _HIDE_LABELS, _FRAMES, _EVERY, _READERS)
FLAGS += (_OVERWRITE, _MAX_PIXELS, _DOWNLOAD_MB, _SECONDS, *shared.PROCESSES)


class EarlySignal:
    """Ends the process until predicting has handlers; what was downloaded is deleted.

    Python drops an exception that a signal raises within a library's callback, so the
    signal is remembered as well.
    """

    def __init__(self):
        self.number = 0

    def __call__(self, number: int, _: object) -> None:
        self.number = number
        self.check()

    def check(self) -> None:
        """Ends the process if there was a signal."""
        if self.number:
            sys.exit(128 + self.number)


_EARLY = EarlySignal()


def predict(overrides: list[str], scratch: str) -> "Summary":
    """Predicts as the flags say; as one of several processes, a part of the pictures.

    Args:
      scratch: folder for what is downloaded.
    """
    from solov2_jax import distributed
    from solov2_jax.inference.predictor import Predictor
    from solov2_jax.tools.multiview.build import build_views
    from solov2_jax.tools.predict.dealing import own_part
    from solov2_jax.tools.predict.outputs import parse_classes
    from solov2_jax.tools.predict.predict_files import predict_files

    # Whatever can be wrong is found before the weights are loaded and compiled for.
    with distributed.fail_together():
        shared.check_model(exported=(_BATCH_SIZE, _SHAPES))
        tta, tiles = shared.view_options()
        options = _options()
    sources = _open_sources(overrides, scratch, options.formats)
    predictor = shared.load_for_all(overrides)
    with distributed.fail_together():
        labels = parse_classes(_CLASSES.value, predictor.class_names, predictor.category_ids)
        score = shared.least_scores(predictor)
    options = replace(options, keep=replace(options.keep, labels=labels, score=score))
    if not isinstance(predictor, Predictor):  # one view of each image, shapes as exported
        part = own_part(sources)
        return predict_files(predictor, part.sources, _OUTPUT.value, options, part.numbers)
    predictor.limit_score = options.keep.lowest
    predictor, sizes, shapes = _in_few_shapes(predictor, sources)
    part = own_part(sources, sizes, predictor.padded_shape)
    predictor = shared.on_local_devices(predictor, most_devices(part.sources))
    options = replace(options, batch_size=_BATCH_SIZE.value * predictor.num_devices)
    if not (tta or tiles):
        own = [shape for shape in shapes if part.numbers is None or shape in part.shapes]
        predictor.compile(own, options.batch_size, wait=False)
    multiview = build_views(predictor, tta, tiles)
    _EARLY.check()
    return predict_files(multiview, part.sources, _OUTPUT.value, options, part.numbers)


def _options() -> "FileOptions":
    """Returns what is written and kept, classes and scores aside."""
    from PIL import Image

    from solov2_jax.data import image_files
    from solov2_jax.tools.predict.outputs import DetectionFilter, parse_formats
    from solov2_jax.tools.predict.predict_files import FileOptions

    if _MAX_PIXELS.value is not None:
        image_files.max_pixels = Image.MAX_IMAGE_PIXELS = _MAX_PIXELS.value
    return FileOptions(
        parse_formats(_WRITE.value),
        DetectionFilter(0.0, most=_MAX.value),
        color_by=_COLOR_BY.value or ("track" if _TRACK.value else "object"),
        labels=not _HIDE_LABELS.value,
        batch_size=_BATCH_SIZE.value,
        track=_TRACK.value,
        overwrite=_OVERWRITE.value,
    )


def _open_sources(overrides: list[str], scratch: str, formats: Sequence[str]) -> "list[Source]":
    """Returns the sources, whose outputs can be written."""
    from solov2_jax import distributed
    from solov2_jax.download import DownloadLimits
    from solov2_jax.tools.predict.dealing import open_for_all
    from solov2_jax.tools.predict.output_folder import OutputFolder
    from solov2_jax.tools.predict.outputs import check_outputs
    from solov2_jax.tools.predict.sources import open_sources

    pixels = shared.model_pixels(overrides)

    def open_all() -> "list[Source]":
        return open_sources(
            _INPUT.value,
            scratch,
            threads=_READERS.value,
            limit=_FRAMES.value,
            every=_EVERY.value,
            download=DownloadLimits(round(_DOWNLOAD_MB.value * 1e6), _SECONDS.value),
            pixels=pixels,
        )

    rank = distributed.rank()
    if rank[1] > 1 and _TRACK.value:
        raise distributed.AgreedError(
            f"--track follows objects from frame to frame, which {rank[1]} processes cannot; "
            "start one process (--distributed=off)"
        )
    if rank[1] == 1:
        sources = open_all()
    else:
        sources = open_for_all(_INPUT.value, open_all, _READERS.value, pixels)
    folder = OutputFolder(_OUTPUT.value, _OVERWRITE.value, rank)
    distributed.broadcast_from_host0(lambda: check_outputs(sources, folder, formats))
    return sources


def _in_few_shapes(
    predictor: "Predictor", sources: "Sequence[Source]"
) -> "tuple[Predictor, list[Size], tuple[Bucket, ...]]":
    """Returns (predictor of few padded shapes, sizes of the pictures, shapes to compile for).

    There are sizes if something depends on them, and shapes to compile unless the config
    names its own.
    """
    from solov2_jax import distributed
    from solov2_jax.inference.preprocess import default_buckets
    from solov2_jax.tools.predict.sources import shapes_of, sizes_of

    input_ = predictor.input
    named = input_.buckets != default_buckets(input_.min_size, input_.max_size)
    few = _SHAPES.value and not named
    sizes: list[Size] = []
    if few or distributed.rank()[1] > 1:
        sizes = distributed.broadcast_from_host0(lambda: sizes_of(sources))
    if named:
        return predictor, sizes, ()
    predictor = predictor.with_shapes(())
    if not few:
        return predictor, sizes, ()
    shapes = shapes_of(sizes, predictor.padded_shape, _SHAPES.value)
    return predictor.with_shapes(shapes), sizes, shapes


def most_devices(sources: Sequence[Any]) -> int:
    """Returns how many devices have something to do; 0: all."""
    from solov2_jax.tools.predict.sources import is_live

    if is_live(_INPUT.value):
        return 1  # a frame waits for no other one
    totals = [source.total() for source in sources]
    return 0 if None in totals else max(1, sum(total or 0 for total in totals))


def main(overrides: list[str]) -> None:
    from solov2_jax import distributed

    process, count = distributed.rank()
    for each in (signal.SIGINT, signal.SIGTERM):
        # Others that wait for this one are ended by its death, not by a tidy end.
        signal.signal(each, _EARLY if count == 1 else signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            summary = predict(overrides, scratch)
        except KeyboardInterrupt:  # the second signal while predicting
            if count > 1:
                raise
            sys.exit(128 + signal.SIGINT)
        problems = distributed.broadcast_from_host0(lambda: summary.report(_OUTPUT.value))
    if problems and process == 0:
        sys.stdout.flush()
        print(f"error: {problems}", file=sys.stderr, flush=True)
    from solov2_jax.tools.predict.sources import is_live

    if summary.stopped and not (summary.stopped == signal.SIGINT and is_live(_INPUT.value)):
        sys.exit(128 + summary.stopped)
    if problems:
        sys.exit(1)


run = functools.partial(app.run, main, FLAGS, shared.run_joined)
