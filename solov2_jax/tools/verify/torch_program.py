"""torchvision's or timm's backbone on the folder that is given; see `original`.

With a "package" in `case.json` it only writes `names.json`, its tensors' names and shapes.
"""

# pyright: reportMissingImports=false
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

# timm's names of the backbones.
TIMM = {
    "convnext_t": "convnext_tiny",
    "convnext_s": "convnext_small",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "dinov2_s": "vit_small_patch14_dinov2",
}
ANY_SIZE = {"swin_t": {"strict_img_size": False}, "dinov2_s": {"dynamic_img_size": True}}
ANY_SIZE["swin_s"] = ANY_SIZE["swin_t"]


TORCHVISION = {
    "convnext_t": ("convnext_tiny", (1, 3, 5, 7)),
    "convnext_s": ("convnext_small", (1, 3, 5, 7)),
    "mobilenet_v3_large": ("mobilenet_v3_large", (3, 6, 12, 15)),
    "swin_t": ("swin_t", (1, 3, 5, 7)),
    "swin_s": ("swin_s", (1, 3, 5, 7)),
}
CLASSIFIER = ("fc.", "head.", "classifier.", "mask_token")
BLOCKS = {
    18: [2, 2, 2, 2],
    34: [3, 4, 6, 3],
    50: [3, 4, 6, 3],
    101: [3, 4, 23, 3],
    152: [3, 8, 36, 3],
}


def fail(missing: str) -> None:
    print(json.dumps({"missing": missing}), flush=True)
    sys.exit(3)


def need(package: str) -> Any:
    """Returns a package, or ends the process with the word that it is missing."""
    try:
        return __import__(package)
    except ImportError as error:
        fail(f"{error.name or package} is not installed")


def residual(backbone: dict[str, Any], package: str) -> tuple[Any, list[Any]]:
    """Returns a ResNet and its stages."""
    blocks = BLOCKS[backbone["depth"]]
    if package == "timm":
        from timm.models import resnet

        options = {"avg_down": backbone["avg_down"]}
        if backbone["deep_stem"]:
            options |= {"stem_type": "deep", "stem_width": 32}
        options |= {"cardinality": backbone["groups"], "base_width": backbone["width_per_group"]}
    else:
        from torchvision.models import resnet

        options = {k: backbone[k] for k in ("groups", "width_per_group")}
    block = resnet.Bottleneck if backbone["depth"] >= 50 else resnet.BasicBlock
    model = resnet.ResNet(block, blocks, **options)
    return model, [model.layer1, model.layer2, model.layer3, model.layer4]


def build(backbone: dict[str, Any], package: str) -> tuple[Any, list[Any]]:
    """Returns a package's model, and its modules at strides 4 to 32."""
    need(package)
    name = backbone["name"]
    if name == "resnet":
        return residual(backbone, package)
    if package == "torchvision":
        from torchvision import models

        kind, stages = TORCHVISION[name]
        model = getattr(models, kind)()
        return model, [model.features[i] for i in stages]
    model = need("timm").create_model(TIMM[name], **ANY_SIZE.get(name, {}))
    if name == "mobilenet_v3_large":
        return model, [model.blocks[i] for i in (1, 2, 4, 5)]
    if name == "dinov2_s":
        return model, [model.norm]
    return model, list(model.layers if name.startswith("swin") else model.stages)


def package_of(names: list[str]) -> str:
    """Returns the package whose names these are."""
    if any(n.startswith("downsample_layers.") for n in names):
        fail("the paper's ConvNeXt is no package; nothing to compare with")
    if any(n.startswith("encoder.layer.") for n in names):
        fail("transformers' Dinov2Model has no place here; timm has the same weights")
    if "layers.0.downsample.reduction.weight" in names:
        fail("Microsoft's Swin is no package; timm has the same weights")
    if any(n.startswith("conv1.3.") for n in names):
        return "timm"
    ours = ("features.", "layer1.")
    return "torchvision" if any(n.startswith(ours) for n in names) else "timm"


def keep(
    found: dict[str, Any], name: str, last: bool, module: Any, inputs: Any, result: Any
) -> None:
    """Notes a feature; `last`: its channels are its last axis."""
    found[name] = (result if last else result.permute(0, 2, 3, 1)).numpy()


def main(folder: Path) -> None:
    torch = need("torch")
    case = json.loads((folder / "case.json").read_text())
    if "package" in case:
        model, _ = build(case["model"]["backbone"], case["package"])
        shapes = {n: list(v.shape) for n, v in model.state_dict().items()}
        (folder / "names.json").write_text(json.dumps(shapes))
        return
    with np.load(folder / "state.npz") as file:
        state = {name: torch.from_numpy(file[name]) for name in file.files}
    model, stages = build(case["model"]["backbone"], package_of(list(state)))
    used = {n: v for n, v in state.items() if not n.startswith(CLASSIFIER)}
    missing, unexpected = model.load_state_dict(used, strict=False)
    needless = (*CLASSIFIER, "norm.")
    lacking = [
        n for n in missing if not n.endswith(("_tracked", "_index")) and not n.startswith(needless)
    ]
    if lacking or unexpected:
        raise ValueError(
            f"its network lacks {len(unexpected)} of the tensors ({unexpected[:3]}), and the file "
            f"{len(lacking)} of its ({lacking[:3]})"
        )
    arrays: dict[str, Any] = {}
    name = case["model"]["backbone"]["name"]
    last = name.startswith(("swin", "dinov2"))
    for level, stage in enumerate(stages, start=2):
        stage.register_forward_hook(functools.partial(keep, arrays, f"backbone/res{level}", last))
    image = torch.from_numpy(np.load(folder / "image.npy")).permute(0, 3, 1, 2).contiguous()
    if name == "dinov2_s":  # patches of 14 pixels at stride 16: of the image at 7/8 of its size
        image = torch.nn.functional.interpolate(image, scale_factor=7 / 8, mode="bilinear")
    with torch.no_grad():
        model.eval()(image)
    if name == "dinov2_s":
        tokens = arrays.pop("backbone/res2")[:, 1:]
        h, w = image.shape[2] // 14, image.shape[3] // 14
        arrays["backbone/tokens"] = tokens.reshape(1, h, w, -1)
    np.savez(folder / "original.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
