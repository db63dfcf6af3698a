"""One of several processes that predict halves of pictures, without a network.

python tests/predict_part.py --input DIR --out DIR, and the flags by which processes join
"""

import errno
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_output_folder import ALL, Halves

from solov2_jax import distributed
from solov2_jax.config_schema import number, text, whole
from solov2_jax.data.pixel_format import RGB
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag
from solov2_jax.tools.predict.dealing import open_for_all, own_part
from solov2_jax.tools.predict.output_folder import OutputFolder
from solov2_jax.tools.predict.outputs import DetectionFilter, check_outputs
from solov2_jax.tools.predict.predict_files import FileOptions, predict_files
from solov2_jax.tools.predict.sources import open_sources, sizes_of

INPUT, OUT = (Flag(name, text(), "", required=True) for name in ("input", "out"))
FAIL_AT = Flag("fail_at", whole(-1, -1), "Picture of this process at which its disk is full.")
SECONDS = Flag("seconds", number(0.0, 0), "For a picture, to have time for a signal.")
FLAGS = (INPUT, OUT, FAIL_AT, SECONDS, *shared.PROCESSES)


class Slow(Halves):
    """Takes its time, and fails at a picture."""

    done = 0

    def predict_images(self, images, batch_size=1):
        if self.done == FAIL_AT.value:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        print("a picture", file=sys.stderr, flush=True)
        self.done += 1
        time.sleep(SECONDS.value)
        return super().predict_images(images, batch_size)


def main(overrides):
    del overrides

    def open_all():
        return open_sources(INPUT.value, "", threads=1, limit=0, every=1)

    formats = (*ALL, "cvat", "label_studio")
    sources = open_for_all(INPUT.value, open_all, 1, RGB)
    folder = OutputFolder(OUT.value, rank=distributed.rank())
    distributed.broadcast_from_host0(lambda: check_outputs(sources, folder, formats))
    sizes = distributed.broadcast_from_host0(lambda: sizes_of(sources))
    part = own_part(sources, sizes, lambda height, width: (height, width))
    options = FileOptions(formats, DetectionFilter(0.3))
    summary = predict_files(Slow(), part.sources, OUT.value, options, part.numbers)
    stopped = f"stopped {summary.stopped}" if summary.stopped else "done"
    print(f"{stopped}: {summary.pictures} pictures, {summary.objects} objects", file=sys.stderr)
    print(f"problems: {summary.problems}", file=sys.stderr)


if __name__ == "__main__":
    app.run(main, FLAGS, shared.run_joined)
