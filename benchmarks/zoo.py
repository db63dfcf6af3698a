"""Networks of other programs beside ours, on weights made up: the tables of docs/model_zoo.md.

    python benchmarks/zoo.py --list
    python benchmarks/zoo.py --peer .cache/peer/bin/python --only mmdet
    python benchmarks/zoo.py --peer .cache/paddle/bin/python --only paddle

The other program is asked for the names and shapes of its network's tensors. A file of such
tensors, drawn by their names, goes the way of any file through our reader into our network,
and by its own names into theirs. Prints a row of Markdown for each network, and writes
results/zoo.json. A difference beyond `verify`'s limits ends it with exit code 1.
"""

import argparse
import json
import pickle
import sys
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np

from solov2_jax.config import load_config
from solov2_jax.tools.verify import compare, original, ours
from solov2_jax.weights.array_files import write_torch
from solov2_jax.weights.sources import read_weights
from solov2_jax.weights.tables import to_mmdet

# Layers that Paddle's state dicts have under two names.
SECOND_NAMES = {
    "solov2_head.solo_": "solov2_head.bbox_head.solo_",
    "mask_head.conv_pred.": "mask_head.mask_feat_head.conv_pred.0.",
}
# Of residual branches: without small ones rounding grows from block to block.
LAST_NORMS = ("bn3", "branch2c", "_linear_", ".block.2.1.", ".block.3.1.", "layer_scale", "gamma")
CLASSES, SIZE = 5, (128, 160)
# timm's Swin shifts its windows otherwise where they do not divide the sides.
SIZES = {"timm Swin-S": (224, 224)}


class Network(NamedTuple):
    """A network: its program, and the config's keys."""

    program: str  # of `verify`'s
    config: str
    keys: tuple[str, ...] = ()
    package: str = ""  # of backbones
    static: bool = False  # by the names of PaddleDetection's static graphs


def _backbone(name: str, package: str, *keys: str) -> Network:
    keys = (*keys, f"model.backbone.name={name}") if name != "resnet" else keys
    return Network("torch", "r50_3x", keys, package)


_VD = ("model.backbone.deep_stem=True", "model.backbone.avg_down=True")
_CAFFE = ("model.backbone.stride_in_1x1=True", "input.channel_order=BGR")
_PLAIN = ("model.backbone.stride_in_1x1=False",)
NETWORKS: dict[str, Network] = {
    "mmdet R18": Network("mmdet", "zoo:mmdet_r50", ("model.backbone.depth=18",)),
    "mmdet R50": Network("mmdet", "zoo:mmdet_r50"),
    "mmdet R50 light": Network("mmdet", "zoo:mmdet_light_r50"),
    "mmdet R50, BGR, stride in the 1x1": Network("mmdet", "zoo:mmdet_r50", _CAFFE),
    "mmdet R101 DCN": Network("mmdet", "zoo:mmdet_r101_dcn"),
    "mmdet X101 64x4d DCN": Network("mmdet", "zoo:mmdet_x101_dcn"),
    "mmdet R50 light DCN": Network("mmdet", "zoo:mmdet_light_r50_dcn"),
    "mmdet R50 light DCN version 1, 2 groups": Network(
        "mmdet", "zoo:solo_light_512_dcn_r50", ("model.dcn.groups=2",)
    ),
    "mmdet R50 vd DCN, batch norm in the FPN": Network(
        "mmdet",
        "zoo:mmdet_r101_dcn",
        ("model.backbone.depth=50", *_VD, "model.fpn.norm=sync_bn"),
    ),
    "mmdet R50 32x4d, group norm in the FPN": Network(
        "mmdet",
        "zoo:mmdet_r50",
        ("model.backbone.groups=32", "model.backbone.width_per_group=4", "model.fpn.norm=gn"),
    ),
    "paddle R50": Network("paddle", "zoo:paddle_r50"),
    "paddle R101 vd DCN": Network("paddle", "zoo:paddle_r101_vd_dcn"),
    "paddle R50 vd DCN 512": Network("paddle", "zoo:paddle_r50_vd_dcn_512"),
    "paddle static MobileNetV3": Network("paddle", "zoo:paddle_mobilenet_v3_448", static=True),
    "paddle static R50": Network("paddle", "zoo:paddle_r50", static=True),
    "paddle static R101 vd DCN": Network(
        "paddle", "zoo:paddle_r101_vd_dcn", ("model.dcn.head_bias=False",), static=True
    ),
    "paddle static R50 vd DCN 512": Network(
        "paddle",
        "zoo:paddle_r50_vd_dcn_512",
        ("model.dcn.head_bias=False", "model.dcn.mask_head=False"),
        static=True,
    ),
    "torchvision ResNet-50": _backbone("resnet", "torchvision", *_PLAIN),
    "torchvision ResNeXt-50 32x4d": _backbone(
        "resnet",
        "torchvision",
        *_PLAIN,
        "model.backbone.groups=32",
        "model.backbone.width_per_group=4",
    ),
    "timm resnet50d": _backbone("resnet", "timm", *_PLAIN, *_VD),
    "torchvision ConvNeXt-T": _backbone("convnext_t", "torchvision"),
    "timm ConvNeXt-S": _backbone("convnext_s", "timm"),
    "torchvision MobileNetV3-large": _backbone("mobilenet_v3_large", "torchvision"),
    "timm mobilenetv3_large_100": _backbone("mobilenet_v3_large", "timm"),
    "torchvision Swin-T": _backbone("swin_t", "torchvision"),
    "timm Swin-S": _backbone("swin_s", "timm"),
    "timm DINOv2 ViT-S/14": _backbone("dinov2_s", "timm"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="the networks' names")
    parser.add_argument("--peer", default=sys.executable, help="python with the other program")
    parser.add_argument("--only", default="", help="networks whose names begin so")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder")
    args = parser.parse_args()
    chosen = {name: n for name, n in NETWORKS.items() if name.startswith(args.only)}
    if args.list or not chosen:
        print("\n".join(NETWORKS))
        return
    content = {**harness.read(args.results, "zoo"), **harness.header("zoo")}
    rows = content.setdefault("rows", {})
    print(HEAD)
    for name, network in chosen.items():
        rows[name] = measure(network, args.peer, SIZES.get(name, SIZE))
        print(row(name, rows[name]), flush=True)
        harness.write(content, args.results)
    if wrong := [name for name in chosen if rows[name]["wrong"]]:
        sys.exit(f"error: more than rounding: {', '.join(wrong)}")


def measure(network: Network, peer: str, size: tuple[int, int]) -> dict[str, Any]:
    """Returns the differences of a network on a picture of the size."""
    config = load_config(network.config, [f"--config.{key}" for key in network.keys])
    with tempfile.TemporaryDirectory() as folder:
        path = write_file(network, config, Path(folder), peer)
        weights = read_weights(path)
        for key in ("input.channel_order", "input.mean", "input.std"):
            weights.settings.pop(key, None)  # a file of these names may have any
        weights.settings.pop("model.backbone.stride_in_1x1", None)
        picture = ours.example_picture(*size)
        run = ours.run_network if weights.num_classes else ours.run_backbone
        with ours.highest_precision():
            computed, _ = run(config, weights, picture)
        found = original.find_original(config, weights)
        assert not isinstance(found, original.Unavailable), found
        place = Path(folder) / "run"
        place.mkdir()
        image = ours.normalised(config, picture)
        theirs = original.run_original(found, config, image, place, peer)
        assert not isinstance(theirs, original.Unavailable), theirs
        figures = compare.compare(computed, theirs).figures()
        if network.program == "mmdet":
            figures["written_back"] = same_again(config, weights, found.state)
    return figures


def write_file(network: Network, config: Any, folder: Path, peer: str) -> str:
    """Returns a file of the program's kind with every tensor of its network."""
    case = original.case_of(config)
    case["model"]["num_classes"], case["static"] = CLASSES, network.static
    if network.package:
        case["package"] = network.package
    why = original.run_program(network.program, case, folder, peer)
    if why:
        sys.exit(f"error: {why} in {peer}; see benchmarks/README.md")
    shapes = json.loads((folder / "names.json").read_text())
    state = {
        name: draw(name, tuple(shape))
        for name, shape in shapes.items()
        if not name.endswith(("num_batches_tracked", "relative_position_index"))
    }
    path = folder / ("file.pdparams" if network.program == "paddle" else "file.pth")
    if network.program == "paddle":
        path.write_bytes(pickle.dumps(state, 4))
    else:
        write_torch(str(path), state, {}, key="state_dict")
    return str(path)


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a tensor's float32 values: seeded by its name, of a size that its role asks for."""
    for second, first in SECOND_NAMES.items():
        name = name.replace(second, first)
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    fan = np.prod(shape[1:])
    if name.endswith(("running_var", "_variance")):
        return np.float32(np.exp(0.2 * noise))
    if "offset" in name and not name.endswith("_offset"):  # taps move by a pixel or so
        return np.float32(noise if len(shape) == 1 else 0.3 * noise / np.sqrt(fan))
    if name.endswith(("solo_cate.bias", "conv_cls.bias")):
        return np.float32(-2.2 + 0.1 * noise)
    shifts = ("bias", "_offset", "_b", "_mean", "bias_table", "cls_token", "pos_embed")
    if name.endswith(shifts):
        return np.float32(0.05 * noise)
    if len(shape) < 2 or "layer_scale" in name or "gamma" in name:
        last = any(part in name for part in LAST_NORMS)
        return np.float32((1 + 0.1 * noise) * (0.3 if last else 1))
    noise -= noise.mean(tuple(range(1, noise.ndim)), keepdims=True)
    gain = 1.0 if "neck" in name or "fpn" in name else 2.0
    if name.endswith(("solo_kernel.weight", "conv_kernel.weight")):
        gain *= 0.16
    return np.float32(noise * np.sqrt(gain / fan))


def same_again(config: Any, weights: Any, state: Mapping[str, np.ndarray]) -> bool:
    """Returns whether our leaves, written by mmdetection's names, are the tensors again."""
    back = to_mmdet(weights.flat, config.model.backbone.avg_down)
    names = {name for name in state if not name.endswith("num_batches_tracked")}
    return back.keys() == names and all(np.array_equal(back[n], state[n]) for n in names)


HEAD = """\
| network | class logits | kernels | mask features | scores | least mask IoU | detections |
|---|---|---|---|---|---|---|"""


def row(name: str, figures: Mapping[str, Any]) -> str:
    """Returns a row of the table; of a backbone, its largest difference in the last cell."""
    tensors = figures["tensors"]
    if "cate" not in tensors:
        return f"| {name} | features | {max(tensors.values()):.1e} |"
    cells = [f"{tensors[key]:.1e}" for key in ("cate", "kernel", "mask_feat")]
    if figures["detections"] == [0, 0]:
        return f"| {name} | {' | '.join(cells)} | | | |"
    cells.append(f"{figures['largest_score_difference']:.1e}")
    cells.append(f"{figures['least_mask_iou']:.5f}")
    return f"| {name} | {' | '.join(cells)} | {figures['detections'][0]} |"


if __name__ == "__main__":
    main()
