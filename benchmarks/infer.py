"""Inference, ours beside others: network alone, whole image, or stage by stage.

    python benchmarks/infer.py network --config configs/r50_3x.py --size 800 1333
    python benchmarks/infer.py image --peers channels_last --allocator tuned
    python benchmarks/infer.py stages --peers eager channels_last

`network`: normalised pixels to raw outputs. `image`: uint8 pixels of the network's
size to masks of that size. The peers need `python benchmarks/peer.py`; `--peers` with
no name measures ours alone.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import cases
import harness
import peer

# By what a program found: how far from ours it may be. Of both, the same work.
TOLERANCES = {
    "network": {"cate": 1e-3, "kernel": 1e-3, "mask_feat": 1e-3},
    "image": {
        "candidates": 0.01,
        "detections": 0.0,
        "classes": 0.03,
        "mask_pixels": 0.01,
    },
    "stages": {},
}


def main(argv: list[str]) -> None:
    """Measures what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted(TOLERANCES))
    cases.add_arguments(parser)
    harness.add_arguments(parser, runs=10)
    peer.add_arguments(parser, peer.INFERENCE)
    args, config = cases.parse(parser, argv)
    images = cases.pad_images(cases.make_images(args), config)
    arrays = {
        "image": images,
        "image_size": cases.np.full((args.batch, 2), args.size, "int32"),
        "image_id": cases.np.arange(args.batch),
    }
    with tempfile.TemporaryDirectory() as folder:
        case = cases.write_case(Path(folder), config, arrays)
        programs = [harness.ours(args.what, case)]
        programs += [peer.program(form, args.what, case, args) for form in args.peers]
        work = {"script": "infer", "what": args.what, **cases.describe(args)}
        name = cases.name_of("infer", args, args.what)
        harness.measure(name, work, programs, args, TOLERANCES[args.what])


if __name__ == "__main__":
    main(sys.argv[1:])
