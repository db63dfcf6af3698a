"""Writes golden/deform.npz: deformable convolutions and their gradients by torchvision.

    python tests/make_deform_golden.py

Needs torch and torchvision, which the tests do not. Arrays are in our layout, NHWC and HWIO;
inputs are made again by `case_arrays`, so that only results are stored.
"""

import pathlib
from typing import Any

import numpy as np

# name -> (batch, height, width), kernel size, channels in and out, stride, padding, dilation,
# groups, deformable groups, version.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"size": (2, 7, 9), "channels": (8, 6)},
    "stride": {"size": (1, 9, 8), "channels": (8, 4), "stride": 2},
    "dilation": {"size": (1, 8, 7), "channels": (4, 4), "dilation": 2, "padding": 2},
    "groups": {"size": (2, 6, 5), "channels": (8, 12), "groups": 4},
    "deform_groups": {"size": (1, 5, 7), "channels": (8, 4), "deform_groups": 2, "groups": 2},
    "version1": {"size": (1, 6, 7), "channels": (4, 4), "deform_groups": 4, "version": 1},
    "1x1": {"size": (1, 5, 6), "channels": (4, 8), "k": 1, "padding": 0},
    "no_padding": {"size": (1, 7, 5), "channels": (4, 4), "padding": 0, "stride": 2},
}


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """Returns a case with its defaults."""
    defaults = {"k": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 1}
    return {**defaults, "deform_groups": 1, "version": 2, **case}


def case_arrays(name: str) -> dict[str, np.ndarray]:
    """Returns x, kernel, offset, mask (not of version 1) and grad of the result.

    Offsets are up to some pixels, so that many taps read beyond the borders.
    """
    case = settings(CASES[name])
    rng = np.random.default_rng(sorted(CASES).index(name))
    (b, h, w), k, (c, d) = case["size"], case["k"], case["channels"]
    reach = case["dilation"] * (k - 1) + 1
    oh, ow = ((n + 2 * case["padding"] - reach) // case["stride"] + 1 for n in (h, w))
    taps = case["deform_groups"] * k * k
    arrays = {
        "x": rng.standard_normal((b, h, w, c)),
        "kernel": rng.standard_normal((k, k, c // case["groups"], d)),
        "offset": 2 * rng.standard_normal((b, oh, ow, 2 * taps)),
        "mask": rng.random((b, oh, ow, taps)),
        "grad": rng.standard_normal((b, oh, ow, d)),
    }
    if case["version"] == 1:
        del arrays["mask"]
    return {key: value.astype(np.float32) for key, value in arrays.items()}


def main() -> None:
    """Writes the file."""
    import torch
    from torchvision.ops import deform_conv2d

    stored = {}
    for name in CASES:
        case, arrays = settings(CASES[name]), case_arrays(name)
        grad = torch.from_numpy(arrays.pop("grad").transpose(0, 3, 1, 2))
        axes = {key: (3, 2, 0, 1) if key == "kernel" else (0, 3, 1, 2) for key in arrays}
        inputs = {
            key: torch.from_numpy(np.ascontiguousarray(a.transpose(axes[key]))).requires_grad_()
            for key, a in arrays.items()
        }
        y = deform_conv2d(
            inputs["x"],
            inputs["offset"],
            inputs["kernel"],
            stride=case["stride"],
            padding=case["padding"],
            dilation=case["dilation"],
            mask=inputs.get("mask"),
        )
        y.backward(grad)
        stored[f"{name}/y"] = y.detach().numpy().transpose(0, 2, 3, 1)
        for key, value in inputs.items():
            back = (2, 3, 1, 0) if key == "kernel" else (0, 2, 3, 1)
            assert value.grad is not None
            stored[f"{name}/d_{key}"] = value.grad.numpy().transpose(back)
    path = pathlib.Path(__file__).parent / "golden" / "deform.npz"
    np.savez_compressed(path, **stored)
    print(f"wrote {path}: {len(stored)} arrays")


if __name__ == "__main__":
    main()
