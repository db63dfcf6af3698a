"""One of several processes that evaluate an oracle on the images of tiny_coco.

python tests/evaluate_part.py --images DIR --annotations FILE --out DIR, and the flags
by which processes join
"""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_evaluation_run import Oracle, batches_of, evaluate

from configs import base
from solov2_jax import distributed
from solov2_jax.config_schema import text
from solov2_jax.data.coco import load_coco
from solov2_jax.evaluation.evaluate import StopEvaluation
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag
from solov2_jax.training import build

IMAGES, ANNOTATIONS, OUT = (
    Flag(name, text(), "", required=True) for name in ("images", "annotations", "out")
)


def main(overrides):
    """Evaluates all images, and the first one alone: then a process has none.

    Then as training does with a further validation set, of which an object is missing. Then
    many batches, in which the last process is told to stop.
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

    content = json.loads(pathlib.Path(ANNOTATIONS.value).read_text())
    content["annotations"].pop()
    fewer = pathlib.Path(ANNOTATIONS.value).with_name(f"fewer_{shard[0]}.json")
    fewer.write_text(json.dumps(content))
    config = base.get_config()
    config.input.min_size_test = config.input.max_size_test = 64
    config.data.num_workers, config.eval.batch_size = 0, 1
    config.eval.reports, config.data.vals = (), (("fewer", IMAGES.value, str(fewer)),)
    build.build_predictor = lambda *_: Oracle()
    validations = build.build_validations(config, dataset)
    metrics = build.build_evaluate(config, None, validations, out / "training")({})
    print(f"all metrics: {json.dumps(metrics, sort_keys=True)}", file=sys.stderr)

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
