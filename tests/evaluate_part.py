"""One of several processes that evaluate an oracle on the images of tiny_coco.

python tests/evaluate_part.py --images DIR --annotations FILE --out DIR, and the flags
by which processes join
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_evaluation_run import Oracle, batches_of, evaluate  # noqa: E402

from solov2_jax import distributed
from solov2_jax.config_schema import text
from solov2_jax.data.coco import load_coco
from solov2_jax.evaluation.evaluate import StopEvaluation
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag

IMAGES, ANNOTATIONS, OUT = (
    Flag(name, text(), "", required=True) for name in ("images", "annotations", "out")
)


def main(overrides):
    """Evaluates all images, and the first one alone: then a process has none.

    Then many batches, in which the last process is told to stop.
    """
    del overrides
    import jax

    shard = jax.process_index(), jax.process_count()
    dataset = load_coco(IMAGES.value, ANNOTATIONS.value)
    out = pathlib.Path(OUT.value)
    for name, images in (("all", 0), ("one", 1)):
        oracle = Oracle()
        batches = batches_of(dataset, shard=shard, max_images=images)
        metrics = evaluate(oracle, dataset, batches, out / name)
        seen = f"{name}: process {shard[0]} predicted {len(oracle.shapes)} batches, "
        print(f"{seen} segm/AP {metrics['segm/AP']:.3f}", file=sys.stderr)

    class Told(Oracle):
        def predict_batch(self, batch):
            if shard[0] == shard[1] - 1:
                distributed.request_stop()
            return super().predict_batch(batch)[:0]  # an image is predicted once

    told = Told()
    batch = next(iter(batches_of(dataset)))
    try:
        evaluate(told, dataset, [batch] * (20 + shard[0]), out / "told")
    except StopEvaluation:
        print(f"told: process {shard[0]} predicted {len(told.shapes)} batches", file=sys.stderr)


if __name__ == "__main__":
    app.run(main, (IMAGES, ANNOTATIONS, OUT, *shared.PROCESSES), shared.run_joined)
