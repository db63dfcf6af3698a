"""Deformable convolutions and their gradients beside torchvision's.

    python benchmarks/deform.py --peer .cache/peer/bin/python

3x3, version 2, one group, one image, float32: layers as stages res3, res4 and res5 and the
heads have them. The backward pass gives the gradients of input, kernel, offsets and factors.
"""

import argparse
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import harness
import numpy as np
from harness import Stages, Work

LAYERS = ((50, 128), (32, 256), (16, 512))  # side, channels
FORMS = ("ours", "torchvision")


def main() -> None:
    """Measures both programs in turns, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", default=sys.executable, help="python with torchvision")
    parser.add_argument("--program", choices=FORMS, help=argparse.SUPPRESS)
    harness.add_arguments(parser, runs=15)
    args = parser.parse_args()
    if args.program:
        harness.serve(ours if args.program == "ours" else torchvisions)
        return
    pythons = dict(zip(FORMS, (sys.executable, args.peer), strict=True))
    programs = [
        harness.Program(name, [pythons[name], __file__, "--program", name]) for name in FORMS
    ]
    label = "3x3 deformable convolutions, three layers"
    work = {"script": "deform", "what": "layers", "label": label}
    equal = dict.fromkeys(("outputs", "gradients"), 1e-4)
    harness.measure("deform", work, programs, args, equal)


def layer(side: int, channels: int) -> dict[str, np.ndarray]:
    """Returns input, kernel, offsets (of about a pixel) and factors, NHWC and HWIO."""
    rng = np.random.default_rng(side)
    shapes = {
        "x": (1, side, side, channels),
        "kernel": (3, 3, channels, channels),
        "offset": (1, side, side, 18),
        "mask": (1, side, side, 9),
    }
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arrays["kernel"] /= 3 * np.sqrt(channels)
    arrays["mask"] = 1 / (1 + np.exp(-arrays["mask"]))
    return {name: np.float32(array) for name, array in arrays.items()}


def work_of(calls: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]], about: Any) -> Work:
    """Returns the work of {layer: (forward, backward by its result)}; both end when computed."""
    stages = Stages()

    def run() -> dict[str, Any]:
        results = {}
        for name, (forward, backward) in calls.items():
            start = time.perf_counter()
            y = forward()
            middle = time.perf_counter()
            gradients = backward(y)
            stages.add(f"{name} forward", middle - start)
            stages.add(f"{name} backward", time.perf_counter() - middle)
            results[name] = (y, gradients)
        return results

    def describe(results: dict[str, Any]) -> dict[str, Any]:
        sizes = [float(np.abs(np.asarray(y)).mean()) for y, _ in results.values()]
        means = [float(np.abs(np.asarray(g)).mean()) for _, gs in results.values() for g in gs]
        return {"outputs": sizes, "gradients": means}

    return Work(run, describe, about={"versions": about}, stages=stages)


def ours() -> Work:
    import jax

    from solov2_jax.models.deform import deform_conv2d

    forward = jax.jit(deform_conv2d)
    backward = jax.jit(lambda g, *inputs: jax.vjp(deform_conv2d, *inputs)[1](g))
    calls: dict[str, Any] = {}
    for side, channels in LAYERS:
        inputs = jax.device_put(list(layer(side, channels).values()))

        def apply(inputs=inputs):
            return jax.block_until_ready(forward(*inputs))

        def pull_back(y, inputs=inputs):
            return jax.block_until_ready(backward(jax.numpy.ones_like(y), *inputs))

        calls[f"{side} x {side} x {channels}"] = (apply, pull_back)
    return work_of(calls, {"jax": version("jax")})


def torchvisions() -> Work:
    import torch  # pyright: ignore[reportMissingImports]
    import torchvision  # pyright: ignore[reportMissingImports]

    calls: dict[str, Any] = {}
    for side, channels in LAYERS:
        inputs = []
        for name, array in layer(side, channels).items():
            axes = (3, 2, 0, 1) if name == "kernel" else (0, 3, 1, 2)
            tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(axes)))
            inputs.append(tensor.requires_grad_())

        def apply(inputs=inputs):
            x, kernel, offset, mask = inputs
            return torchvision.ops.deform_conv2d(x, offset, kernel, padding=1, mask=mask)

        def pull_back(y, inputs=inputs):
            return torch.autograd.grad(y, inputs, torch.ones_like(y))

        calls[f"{side} x {side} x {channels}"] = (apply, pull_back)
    found = work_of(calls, {"torch": torch.__version__, "torchvision": torchvision.__version__})
    describe = found.describe

    def detached(results: dict[str, Any]) -> dict[str, Any]:
        return describe({name: (y.detach(), gs) for name, (y, gs) in results.items()})

    found.describe = detached
    return found


if __name__ == "__main__":
    main()
