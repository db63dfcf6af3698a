"""Post-processing alone, ours beside mmdetection's, at a given number of candidates.

    python benchmarks/postprocess.py --candidates 500 --size 800 1333

The outputs are the network's own for a picture; all class logits are shifted so that
exactly so many cells and classes are above the score threshold. Pasting the masks at
the image's size is a stage of its own.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import cases
import harness
import jax
import numpy as np
import peer

from solov2_jax import ops
from solov2_jax.inference.predictor import Predictor
from solov2_jax.models import build_model
from solov2_jax.nms import point_nms

TOLERANCES = {
    "candidates": 0.0,
    "detections": 0.0,
    "classes": 0.03,
    "mask_pixels": 0.01,
}


def main(argv: list[str]) -> None:
    """Measures what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", type=int, default=500)
    cases.add_arguments(parser)
    harness.add_arguments(parser, runs=20)
    peer.add_arguments(parser, peer.POSTPROCESSING)
    args, config = cases.parse(parser, argv)
    if args.batch != 1:
        raise SystemExit("error: --batch: post-processing takes one image at a time")
    size = np.array([args.size], np.int32)
    arrays = {**make_outputs(args, config), "image_size": size}
    with tempfile.TemporaryDirectory() as folder:
        case = cases.write_case(Path(folder), config, arrays)
        programs = [harness.ours("postprocess", case)]
        programs += [peer.program(form, "postprocess", case, args) for form in args.peers]
        work = {"script": "postprocess", "what": f"{args.candidates} candidates"}
        name = cases.name_of("postprocess", args, str(args.candidates))
        work |= cases.describe(args)
        harness.measure(name, work, programs, args, TOLERANCES)


def make_outputs(args: Any, config: Any) -> dict[str, np.ndarray]:
    """Returns the network's outputs with exactly `args.candidates` candidates."""
    model = build_model(config, config.model.num_classes)
    weights = cases.write_weights(config)["adelaidet"]
    variables = Predictor.from_weights(weights, config).variables
    image = cases.pad_images(cases.make_images(args), config)
    size = np.array([args.size], np.int32)
    mean, std = tuple(config.input.mean), tuple(config.input.std)
    pixels = ops.normalize_image(image, size, mean, std)
    outputs = jax.device_get(jax.jit(model.apply)(variables, pixels))
    # A constant added to all logits keeps the order and every local maximum.
    scores = np.asarray(jax.nn.sigmoid(outputs.cate[0].astype(np.float64)))
    peaks = np.asarray(point_nms(scores, tuple(config.model.ins_head.num_grids))) > 0
    logits = np.sort(outputs.cate[0][peaks].astype(np.float64))[::-1]
    if len(logits) <= args.candidates:
        raise SystemExit(f"error: --candidates: the image has only {len(logits)} peaks")
    middle = logits[args.candidates - 1 : args.candidates + 1].mean()
    threshold = config.test.score_threshold
    shift = np.log(threshold / (1 - threshold)) - middle
    return {
        "cate": outputs.cate + np.float32(shift),
        "kernel": outputs.kernel,
        "mask_feat": outputs.mask_feat,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
