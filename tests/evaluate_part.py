"""One of several processes that evaluate an oracle on the images of tiny_coco.

python tests/evaluate_part.py --images DIR --annotations FILE --out DIR, and the flags
by which processes join
"""

import pathlib
import sys

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_evaluation_run import Oracle, batches_of, evaluate  # noqa: E402

from solov2_jax.data.coco import load_coco
from solov2_jax.tools.cli import app, process_flags


def main(overrides):
    """Evaluates all images, and the first one alone: then a process has none."""
    del overrides
    import jax

    shard = jax.process_index(), jax.process_count()
    dataset = load_coco(flags.FLAGS.images, flags.FLAGS.annotations)
    out = pathlib.Path(flags.FLAGS.out)
    for name, images in (("all", 0), ("one", 1)):
        oracle = Oracle()
        batches = batches_of(dataset, shard=shard, max_images=images)
        metrics = evaluate(oracle, dataset, batches, out / name)
        seen = f"{name}: process {shard[0]} predicted {len(oracle.shapes)} batches, "
        print(f"{seen} segm/AP {metrics['segm/AP']:.3f}", file=sys.stderr)


if __name__ == "__main__":
    for flag in ("images", "annotations", "out"):
        flags.DEFINE_string(flag, None, "", required=True)
    app.run(main, joining=process_flags.joining)
