"""Whether a device computes what the reference does, at each precision.

    python benchmarks/parity.py

Features, detections, losses and gradients of the goldens' R18 network against the arrays
that the reference computed (`tests/golden`), where JAX computes, in float32 with each
`model.matmul_precision` and in bfloat16. Prints a table and ends with exit code 1 if a
figure is outside of what its precision explains. Writes results/parity.json with
`--results`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import cases  # noqa: F401  # puts the sources' folder on the path
import harness
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(harness.HERE.parent / "tests"))

from golden_batch import CASES, make_batch, reference_names  # noqa: E402
from golden_weights import golden_model  # noqa: E402

from configs import base  # noqa: E402
from solov2_jax import ops  # noqa: E402
from solov2_jax.inference.pasting import paste_detections  # noqa: E402
from solov2_jax.models import intermediates  # noqa: E402
from solov2_jax.postprocess import detect  # noqa: E402
from solov2_jax.training.loss import build_loss  # noqa: E402

GOLDEN = harness.HERE.parent / "tests" / "golden"
MEAN, STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)
PRECISIONS = (
    ("float32", "highest"),
    ("float32", "high"),
    ("float32", "default"),
    ("bfloat16", "default"),
)
# The largest error of each figure, by what a product's factors are rounded to; on a CPU
# float32 is float32 whatever is asked for.
LIMITS = {
    "float32 highest": {"features": 1e-3, "detections": 0.02, "losses": 1e-4, "gradients": 0.02},
    "float32 high": {"features": 1e-2, "detections": 0.05, "losses": 1e-3, "gradients": 0.05},
    "float32 default": {"features": 0.05, "detections": 0.1, "losses": 2e-3, "gradients": 0.1},
    "bfloat16 default": {"features": 0.5, "detections": 0.2, "losses": 5e-3, "gradients": 0.2},
}
MEANING = {
    "features": "largest difference, of an array's standard deviation",
    "detections": "share of the reference's that no detection of its class covers, IoU 0.9",
    "losses": "largest relative difference",
    "gradients": "largest difference of an array's norm, of the norm",
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, help="folder for parity.json; none: not written")
    parser.add_argument("--only", choices=sorted(LIMITS), help="this precision alone")
    args = parser.parse_args(argv)
    print(f"parity on {jax.devices()[0].device_kind}")
    rows, wrong = {}, []
    for dtype, precision in PRECISIONS:
        name = f"{dtype} {precision}"
        if args.only not in (None, name):
            continue
        rows[name] = errors(dtype, precision)
        for figure, limit in LIMITS[name].items():
            value = rows[name][figure]
            passed = value <= limit  # not of NaN
            verdict = "ok" if passed else "WRONG"
            print(f"{name:17} {figure:10} {value:.2e}  limit {limit:.0e}  {verdict}", flush=True)
            wrong += [] if passed else [f"{name}: {figure}"]
    print("\n".join(f"{figure}: {text}" for figure, text in MEANING.items()))
    if args.results:
        device = jax.devices()[0].device_kind
        content = harness.header("parity") | {"device": device, "errors": rows, "limits": LIMITS}
        harness.write(content, args.results)
    print("parity: FAILED in " + ", ".join(wrong) if wrong else "parity: passed")
    return 1 if wrong else 0


def errors(dtype: str, precision: str) -> dict[str, float]:
    """Returns the figures of `MEANING`."""
    model, variables = golden_model()
    kind = jnp.dtype(dtype)
    model = model.clone(dtype=kind, backbone=model.backbone.clone(dtype=kind))
    with jax.default_matmul_precision(precision):
        return forward_errors(model, variables) | step_errors(model, variables, dtype, precision)


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def forward_errors(model: Any, variables: Any) -> dict[str, float]:
    """Returns the errors of the features and detections of a picture."""
    arrays = load("forward")
    image = jnp.asarray(arrays["eval_image"].transpose(1, 2, 0)[None])
    size = jnp.asarray([image.shape[1:3]])

    @jax.jit
    def forward(variables: Any, image: Any, size: Any) -> Any:
        x = ops.normalize_image(image, size, MEAN, STD)
        return model.apply(variables, x), intermediates(model, variables, x)

    outputs, seen = forward(variables, image, size)
    *steps, cell_step, mask_step = arrays["eval_steps"]
    pairs = []
    for level, step in zip(range(2, 7), steps, strict=True):
        start = int(step > 1)  # the goldens keep every step-th pixel
        features = seen[f"fpn/p{level}"][:, start::step, start::step].transpose(0, 3, 1, 2)
        pairs.append((features, arrays[f"eval_p{level}"]))
    mask_feat = outputs.mask_feat[:, 1::mask_step, 1::mask_step].transpose(0, 3, 1, 2)
    pairs.append((mask_feat, arrays["eval_mask_pred"]))
    pairs.append((outputs.cate[0].T, arrays["eval_cate"]))
    pairs.append((outputs.kernel[0, ::cell_step].T, arrays["eval_kernel"]))
    difference = max(
        float(np.abs(np.asarray(ours, np.float32) - want).max() / want.std())
        for ours, want in pairs
    )
    return {"features": difference, "detections": missed_share(arrays, outputs, size)}


def missed_share(arrays: dict[str, np.ndarray], outputs: Any, size: Any) -> float:
    """Returns the share of the reference's detections that ours lack."""
    run = jax.jit(
        lambda outputs: detect(
            outputs,
            num_grids=(40, 36, 24, 16, 12),
            score_threshold=0.1,
            mask_threshold=0.5,
            update_threshold=0.05,
            nms_pre=500,
            max_per_image=100,
            nms_type="matrix",
            nms_kernel="gaussian",
            nms_sigma=2.0,
            nms_iou=0.5,
            max_candidates=4096,
        )
    )
    found = run(outputs)
    shape = arrays["eval_det_masks_shape"]
    number = int(np.asarray(found.valid[0]).sum())
    size = tuple(int(side) for side in np.asarray(size)[0])
    original = tuple(int(side) for side in shape[1:])
    masks, _ = paste_detections(
        found.soft_masks, 0, np.arange(number), size, original, threshold=0.5
    )
    packed = arrays["eval_det_masks_packed"]
    want = np.unpackbits(packed, axis=-1)[..., : shape[2]].reshape(shape[0], -1).astype(np.float32)
    ours = np.asarray(masks).reshape(number, -1).astype(np.float32)
    common = want @ ours.T
    union = want.sum(1)[:, None] + ours.sum(1)[None] - common
    same = arrays["eval_det_classes"][:, None] == np.asarray(found.labels[0, :number])[None]
    covered = ((common / np.maximum(union, 1) >= 0.9) & same).any(1)
    return float(1 - covered.mean())


def step_errors(model: Any, variables: Any, dtype: str, precision: str) -> dict[str, float]:
    """Returns the errors of the losses and gradients of two pictures."""
    arrays, config = load("train"), base.get_config()
    config.model.num_classes, config.targets.max_pairs = 3, 128
    config.model.dtype, config.model.matmul_precision = dtype, precision
    loss, stats = build_loss(config, model), {"batch_stats": variables["batch_stats"]}

    @jax.jit
    def gradient(params: Any, batch: Any) -> Any:
        with jax.default_matmul_precision(precision):
            compute = lambda p: loss(p, stats, batch, jax.random.key(0))  # noqa: E731
            return jax.value_and_grad(compute, has_aux=True)(params)

    (_, metrics), grads = gradient(variables["params"], make_batch(arrays, CASES["two"]))
    losses = np.array([metrics["loss_ins"], metrics["loss_cate"]], np.float64)
    named, want = reference_names(grads), arrays["two_grad_norms"]
    norms = [np.linalg.norm(named[n].astype(np.float64)) for n in arrays["two_grad_names"]]
    return {
        "losses": float(np.max(np.abs(losses / arrays["two_losses"] - 1))),
        "gradients": float(np.max(np.abs(np.array(norms) / want - 1))),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
