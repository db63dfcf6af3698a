"""What torchvision and timm compute with small backbones of theirs: tests/golden/backbones.npz.

Run beside torch, torchvision and timm, from the project's folder:

    PYTHONPATH=tests python tests/golden_backbones.py

and beside paddlepaddle 3.3.1 and paddledet 2.6.0, after that:

    PYTHONPATH=tests:solov2_jax/tools/verify python tests/golden_backbones.py paddle

It stores, for each case, the names and shapes of the state dict, whose values are
`backbone_weight` of them, and the features of `golden_image` at strides 4, 8, 16 and 32.
"""

import functools
import json
import sys
import zlib
from pathlib import Path

import numpy as np

SIZE = (64, 96)  # height, width
FILE = Path(__file__).parent / "golden" / "backbones.npz"
SWIN_DEPTHS, SWIN_HEADS = (2, 2, 3, 2), (1, 2, 2, 4)
DEPTHS, WIDTHS = (1, 2, 4, 1), (8, 16, 24, 32)


def golden_image(case: str) -> np.ndarray:
    """Returns float32 [1, h, w, 3]."""
    noise = np.random.default_rng(5).standard_normal((1, *SIZE, 3))
    if case == "swin_timm":  # square, see there
        noise = noise[:, :, : SIZE[0]]
    if case == "mobilenet_paddle":  # for a small file
        noise = noise[:, :32, :64]
    return np.ascontiguousarray(noise, np.float32)


def backbone_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the float32 values of a tensor: draws that its name seeds, by its role."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(("running_var", "_variance")):
        return np.float32(np.exp(0.2 * noise))
    if name.endswith("_mean"):
        return np.float32(0.05 * noise)
    if name.endswith(("bias", "table", "cls_token", "pos_embed", "_offset")):
        return np.float32(0.2 * noise)
    if "gamma" in name or "layer_scale" in name:
        return np.float32(0.5 + 0.1 * noise)
    if len(shape) == 1:
        return np.float32(1 + 0.1 * noise)
    return np.float32(noise * np.sqrt(2 / np.prod(shape[1:])))


def convnext_torchvision():
    from torchvision.models import convnext

    sizes = zip(WIDTHS, (*WIDTHS[1:], None), DEPTHS, strict=True)
    model = convnext.ConvNeXt([convnext.CNBlockConfig(*size) for size in sizes], num_classes=2)
    return model, [model.features[i] for i in (1, 3, 5, 7)]


def convnext_timm():
    from timm.models.convnext import ConvNeXt

    model = ConvNeXt(depths=DEPTHS, dims=WIDTHS, num_classes=2)
    return model, list(model.stages)


def mobilenet_torchvision():
    from torchvision.models import mobilenet_v3_large

    model = mobilenet_v3_large(num_classes=2)
    return model, [model.features[i] for i in (3, 6, 12, 15)]


def mobilenet_timm():
    import timm

    model = timm.create_model("mobilenetv3_large_100", num_classes=2)
    return model, [model.blocks[i] for i in (1, 2, 4, 5)]


def swin_torchvision():
    from torchvision.models import SwinTransformer

    model = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=list(SWIN_DEPTHS),
        num_heads=list(SWIN_HEADS),
        window_size=[7, 7],
        num_classes=2,
    )
    return model, [model.features[i] for i in (1, 3, 5, 7)]


def swin_timm():
    """Sides that are multiples of the window: for others timm shifts another way."""
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=(64, 64),
        embed_dim=8,
        depths=SWIN_DEPTHS,
        num_heads=SWIN_HEADS,
        window_size=2,
        num_classes=2,
    )
    return model, list(model.layers)


def dinov2_timm():
    """One stage: the tokens after the last norm. Sees the image at 7/8 of its size."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=5 * 14,
        patch_size=14,
        embed_dim=32,
        depth=4,
        num_heads=2,
        init_values=1e-5,
        num_classes=0,
        dynamic_img_size=True,
    )
    return model, [model.norm]


CASES = {
    "convnext_torchvision": convnext_torchvision,
    "convnext_timm": convnext_timm,
    "mobilenet_torchvision": mobilenet_torchvision,
    "mobilenet_timm": mobilenet_timm,
    "swin_torchvision": swin_torchvision,
    "swin_timm": swin_timm,
    "dinov2_timm": dinov2_timm,
}


def _keep(found, level, module, args, result):
    found[level] = result


def add_paddle() -> None:
    """Adds the case of PaddleDetection's class, under the names of its static graphs."""
    import paddle
    from paddle_program import static_name
    from ppdet.modeling.backbones.mobilenet_v3 import MobileNetV3

    model = MobileNetV3(feature_maps=[5, 8, 14, 17], with_extra_blocks=True, extra_block_filters=[])
    model.eval()
    case = "mobilenet_paddle"
    names = {name: static_name(f"backbone.{name}") for name in model.state_dict()}
    shapes = {names[n]: list(v.shape) for n, v in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        tensor.set_value(backbone_weight(names[name], tuple(tensor.shape)))
    image = paddle.to_tensor(golden_image(case).transpose(0, 3, 1, 2).copy())
    with paddle.no_grad():
        features = model({"image": image})
    with np.load(FILE) as file:
        arrays = {name: file[name] for name in file.files}
    arrays[f"{case}_shapes"] = np.array(json.dumps(shapes))
    for level, feature in enumerate(features, start=2):
        arrays[f"{case}_res{level}"] = feature.numpy().transpose(0, 2, 3, 1)
        print(case, level, feature.shape, float(feature.std()))
    trained = (v for n, v in shapes.items() if not n.endswith(("_mean", "_variance")))
    print(sum(int(np.prod(shape)) for shape in trained), "parameters")
    np.savez_compressed(FILE, **arrays)


def main() -> None:
    import torch

    arrays: dict[str, np.ndarray] = {}
    for case, build in CASES.items():
        model, stages = build()
        shapes = {n: list(v.shape) for n, v in model.state_dict().items() if v.is_floating_point()}
        state = {n: torch.from_numpy(backbone_weight(n, tuple(s))) for n, s in shapes.items()}
        model.load_state_dict(state, strict=False)
        model.eval()
        found = {}
        for level, stage in enumerate(stages, start=2):
            stage.register_forward_hook(functools.partial(_keep, found, level))
        image = torch.from_numpy(golden_image(case)).permute(0, 3, 1, 2)
        if case == "dinov2_timm":
            image = torch.nn.functional.interpolate(image, scale_factor=7 / 8, mode="bilinear")
        with torch.no_grad():
            model(image)
        arrays[f"{case}_shapes"] = np.array(json.dumps(shapes))
        for level, feature in found.items():
            if case == "dinov2_timm":
                value = feature[:, 1:].reshape(1, SIZE[0] // 16, SIZE[1] // 16, -1)
            else:  # Swin's are channels last already
                value = feature if "swin" in case else feature.permute(0, 2, 3, 1)
            arrays[f"{case}_res{level}"] = value.numpy().astype(np.float32)
            print(case, level, value.shape, float(value.std()))
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    add_paddle() if "paddle" in sys.argv else main()
