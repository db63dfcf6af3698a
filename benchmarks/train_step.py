"""A train step, ours beside others: forward, loss, backward and update.

    python benchmarks/train_step.py --size 512 512 --batch 2 --peers channels_last
    python benchmarks/train_step.py --size 512 512 --peers plain_channels_last

Every program starts from the same weights and takes the same images and objects; the
losses of the first step and the number of pairs must agree. mmdetection builds its
targets from whole masks inside the step; ours gets masks of a quarter of the size,
which its data pipeline makes, and builds the rest; plain torch is given all targets.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import cases
import harness
import peer

# mmdetection counts a cell that two objects hit once, and adds another epsilon to dice.
TOLERANCES = {"loss_ins": 0.03, "loss_cate": 0.03, "num_pairs": 0.0}


def main(argv: list[str]) -> None:
    """Measures what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases.add_arguments(parser)
    harness.add_arguments(parser, runs=6)
    peer.add_arguments(parser, peer.TRAINING)
    args, config = cases.parse(parser, argv)
    batch = cases.make_batch(args, config)
    arrays = {**batch, **cases.add_targets(batch, config)}
    with tempfile.TemporaryDirectory() as folder:
        case = cases.write_case(Path(folder), config, arrays)
        programs = [harness.ours("train", case)]
        programs += [peer.program(form, "train", case, args) for form in args.peers]
        work = {"script": "train_step", "what": "step", **cases.describe(args)}
        name = cases.name_of("train", args)
        harness.measure(name, work, programs, args, TOLERANCES)


if __name__ == "__main__":
    main(sys.argv[1:])
