"""The network, ours beside others: forward, whole image, by stage, train step, post-processing.

    python benchmarks/network.py network --config configs/r50_3x.py --size 800 1333
    python benchmarks/network.py image --peers channels_last --allocator tuned
    python benchmarks/network.py stages --peers eager channels_last
    python benchmarks/network.py train --size 512 512 --batch 2 --peers channels_last
    python benchmarks/network.py postprocess --candidates 500

network: normalised pixels to raw outputs. image: uint8 pixels of the network's size to
masks of that size. train: forward, loss with its targets, backward and update, all from
the same weights and objects. postprocess: from outputs with exactly so many candidates
to the pasted masks. The peers need an environment (README.md); `--peers` with no name
measures ours alone. `--config.model.dtype=bfloat16` and the like as in training.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cases
import harness
import jax
import numpy as np

from solov2_jax import ops
from solov2_jax.inference.predictor import Predictor
from solov2_jax.models import build_model
from solov2_jax.nms import point_nms

OURS_SCRIPT, PEER_SCRIPT = (
    harness.ROOT / "benchmarks" / name for name in ("ours.py", "torch_peer.py")
)


# Peer -> its name in results and the kinds of work that it does. mmdetection runs with the
# channels first ("eager") or last, with its batch norms folded, or compiled.
_ALL = ("network", "image", "stages", "train", "postprocess")
PEERS = {
    "eager": ("mmdetection", _ALL),
    "channels_last": ("mmdetection, channels last", _ALL),
    "fused": ("mmdetection, channels last, norms folded", _ALL[:3]),
    "compile": ("mmdetection, torch.compile", _ALL[:2]),
    "onnxruntime": ("ONNX Runtime", _ALL[:1]),
    "openvino": ("OpenVINO", _ALL[:1]),
}
# How far from ours what a program found may be: all do the same work.
_MASKS = {"detections": 0.0, "classes": 0.03, "mask_pixels": 0.01}
TOLERANCES: dict[str, dict[str, float]] = {
    "network": {"cate": 1e-3, "kernel": 1e-3, "mask_feat": 1e-3},
    "image": {"candidates": 0.01, **_MASKS},
    "stages": {},
    "train": {"loss_ins": 1e-3, "loss_cate": 1e-3, "num_pairs": 0.0},
    "postprocess": {"candidates": 0.0, **_MASKS},
}
RUNS = {"train": 6, "postprocess": 20}


def main(argv: list[str]) -> None:
    """Measures what the arguments ask for."""
    args, config = parse(argv)
    work = {"script": "infer", "what": args.what, **cases.describe(args)}
    parts = ["infer", args.what]
    if args.what == "train":
        work |= {"script": "train_step", "what": "step"}
        parts = ["train"]
    if args.what == "postprocess":
        work |= {"script": "postprocess", "what": f"{args.candidates} candidates"}
        parts = ["postprocess", str(args.candidates)]
    h, w = args.size
    parts += [Path(args.config).stem, f"{h}x{w}", f"b{args.batch}", args.allocator]
    tolerances = dict(TOLERANCES[args.what])
    if config.model.dtype != "float32":  # 8 bits instead of 24
        parts.append(config.model.dtype)
        tolerances = {k: max(v, 0.02) for k, v in tolerances.items() if k.startswith("loss")}
    with tempfile.TemporaryDirectory() as folder:
        case = cases.write_case(Path(folder), config, make_arrays(args, config))
        command = [sys.executable, str(OURS_SCRIPT), args.what, "--case", str(case)]
        programs = [harness.Program("ours", command)]
        programs += [peer_program(peer, args.what, case, args.peer_dir) for peer in args.peers]
        harness.measure("-".join(parts), work, programs, args, tolerances)


def parse(argv: list[str]) -> tuple[Any, Any]:
    """Returns (arguments, config)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(TOLERANCES))
    parser.add_argument("--candidates", type=int, default=500, help="of postprocess")
    cases.add_arguments(parser)
    harness.add_arguments(parser, runs=0)
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=["channels_last"])
    parser.add_argument("--peer_dir", type=Path, default=harness.ROOT / ".cache" / "peer")
    args, config = cases.parse(parser, argv)
    args.runs = args.runs or RUNS.get(args.what, 10)
    for peer in args.peers:
        if args.what not in PEERS[peer][1]:
            parser.error(f"--peers {peer}: it does not run {args.what}")
    if args.what in ("postprocess", "stages") and args.batch != 1:
        parser.error(f"--batch: {args.what} takes one image at a time")
    return args, config


def peer_program(peer: str, kind: str, case: Path, folder: Path) -> harness.Program:
    """Returns a peer's program.

    Args:
      folder: of the environment.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        raise SystemExit(
            f"error: no peer environment in {folder}: make it as benchmarks/README.md says, or "
            "give --peers no name to measure ours alone"
        )
    command = [str(python), str(PEER_SCRIPT), kind, "--form", peer, "--case", str(case)]
    if peer in ("onnxruntime", "openvino") and not (case / "network.onnx").exists():
        export = [*command[:2], "export", "--case", str(case)]
        subprocess.run(export, check=True, stdout=sys.stderr)
    return harness.Program(PEERS[peer][0], command)


def make_arrays(args: Any, config: Any) -> dict[str, np.ndarray]:
    """Returns the arrays that all programs are given."""
    batch = cases.make_batch(config, tuple(args.size), args.batch, args.image)
    if args.what == "postprocess":
        return make_outputs(batch, args.candidates, config) | {"image_size": batch["image_size"]}
    if args.what == "train":
        batch |= cases.make_objects(config, tuple(args.size), args.batch)
        batch |= cases.add_targets(batch, config)
    return batch


def make_outputs(
    batch: dict[str, np.ndarray], candidates: int, config: Any
) -> dict[str, np.ndarray]:
    """Returns the network's outputs for a picture with exactly so many candidates."""
    model = build_model(config, config.model.num_classes)
    predictor = Predictor.from_weights(cases.write_weights(config)["adelaidet"], config)
    mean, std = tuple(config.input.mean), tuple(config.input.std)
    pixels = ops.normalize_image(batch["image"], batch["image_size"], mean, std)
    outputs = jax.device_get(jax.jit(model.apply)(predictor.variables, pixels))
    # A constant added to all logits keeps the order and every local maximum.
    scores = np.asarray(jax.nn.sigmoid(outputs.cate[0].astype(np.float64)))
    peaks = np.asarray(point_nms(scores, tuple(config.model.ins_head.num_grids))) > 0
    logits = np.sort(outputs.cate[0][peaks].astype(np.float64))[::-1]
    if len(logits) <= candidates:
        raise SystemExit(f"error: --candidates: the image has only {len(logits)} peaks")
    middle = logits[candidates - 1 : candidates + 1].mean()
    threshold = config.test.score_threshold
    shift = np.float32(np.log(threshold / (1 - threshold)) - middle)
    return {
        "cate": outputs.cate + shift,
        "kernel": outputs.kernel,
        "mask_feat": outputs.mask_feat,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
