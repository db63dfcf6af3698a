"""SOLOv2 and its loss in bare torch functions: what plain torch can do here.

The same network and the same sums as ours, from one dictionary of weights under
AdelaiDet's names; no framework around it. Targets are given, so this peer is spared the
work of building them. Source: AdelaiDet adet/modeling/solov2/solov2.py.
"""

from typing import Any

import torch
import torch.nn.functional as F

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
Weights = dict[str, torch.Tensor]


class Network:
    """Calls the functions below with one configuration and one set of weights."""

    def __init__(self, config: Any, weights: Weights):
        self.config, self.weights = config["model"], weights

    def conv(self, name: str, x: torch.Tensor, stride: int = 1, bias: bool = False) -> torch.Tensor:
        kernel = self.weights[name + ".weight"]
        shift = self.weights[name + ".bias"] if bias else None
        return F.conv2d(x, kernel, shift, stride, kernel.shape[-1] // 2)

    def conv_bn(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        fields = ("running_mean", "running_var", "weight", "bias")
        norm = [self.weights[f"{name}.norm.{field}"] for field in fields]
        return F.batch_norm(self.conv(name, x, stride), *norm)

    def group_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale, shift = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return F.relu(F.group_norm(x, 32, scale, shift))

    def block(self, name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
        skip = x
        if f"{name}.shortcut.weight" in self.weights:
            skip = self.conv_bn(f"{name}.shortcut", x, stride)
        if self.config["backbone"]["depth"] < 50:
            y = F.relu(self.conv_bn(f"{name}.conv1", x, stride))
            return F.relu(self.conv_bn(f"{name}.conv2", y) + skip)
        first = self.config["backbone"]["stride_in_1x1"]
        strides = (stride, 1) if first else (1, stride)
        y = F.relu(self.conv_bn(f"{name}.conv1", x, strides[0]))
        y = F.relu(self.conv_bn(f"{name}.conv2", y, strides[1]))
        return F.relu(self.conv_bn(f"{name}.conv3", y) + skip)

    def backbone(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Returns res2 .. res5."""
        top = "backbone.bottom_up"
        x = F.relu(self.conv_bn(f"{top}.stem.conv1", x, 2))
        x, features = F.max_pool2d(x, 3, 2, 1), []
        for stage, blocks in enumerate(BLOCKS[self.config["backbone"]["depth"]], 2):
            for i in range(blocks):
                stride = 2 if stage > 2 and i == 0 else 1
                x = self.block(f"{top}.res{stage}.{i}", x, stride)
            features.append(x)
        return features

    def fpn(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Returns p2 .. p6."""
        out, top = [], None
        for level in (5, 4, 3, 2):
            side = self.conv(f"backbone.fpn_lateral{level}", features[level - 2], bias=True)
            top = side if top is None else side + F.interpolate(top, scale_factor=2.0)
            out.insert(0, self.conv(f"backbone.fpn_output{level}", top, bias=True))
        return [*out, F.max_pool2d(out[-1], 1, 2)]

    def tower(self, kind: str, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.config["ins_head"]["num_convs"]):
            name = f"ins_head.{kind}_tower"
            x = self.group_norm(f"{name}.{3 * i + 1}", self.conv(f"{name}.{3 * i}", x))
        return self.conv(f"ins_head.{kind}_pred", x, bias=True).flatten(2)

    def instance_head(self, levels: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns class logits [B, S, K] and kernels [B, S, E]."""
        p2, p3, p4, p5, p6 = levels
        levels = [enlarge(p2, 0.5), p3, p4, p5, to_size(p6, p5.shape[2:])]
        cate, kernel = [], []
        for x, grid in zip(levels, self.config["ins_head"]["num_grids"], strict=True):
            x = to_size(with_coords(x), (grid, grid))
            cate.append(self.tower("cate", x[:, :-2]))
            kernel.append(self.tower("kernel", x))
        return torch.cat(cate, 2).mT, torch.cat(kernel, 2).mT

    def mask_head(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """Returns mask features [B, E, h / 4, w / 4]."""
        total = 0
        for level, x in enumerate(levels[:4]):
            x = with_coords(x) if level == 3 else x
            for j in range(max(level, 1)):
                name = f"mask_head.convs_all_levels.{level}.conv{j}"
                x = self.group_norm(name + ".1", self.conv(name + ".0", x))
                x = enlarge(x, 2.0) if level else x
            total = total + x
        return self.group_norm("mask_head.conv_pred.1", self.conv("mask_head.conv_pred.0", total))

    def __call__(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns (class logits, kernels, mask features) of normalised images."""
        levels = self.fpn(self.backbone(image))
        return *self.instance_head(levels), self.mask_head(levels)


def enlarge(x: torch.Tensor, factor: float) -> torch.Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def to_size(x: torch.Tensor, size: Any) -> torch.Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def with_coords(x: torch.Tensor) -> torch.Tensor:
    h, w = x.shape[2:]
    ys, xs = torch.linspace(-1, 1, h), torch.linspace(-1, 1, w)
    grid = torch.stack([xs.expand(h, w), ys[:, None].expand(h, w)])
    return torch.cat([x, grid.expand(len(x), 2, h, w)], 1)


def solov2_loss(
    outputs: tuple[torch.Tensor, ...], targets: Weights, config: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (dice term, focal term), weighted, of given targets."""
    cate, kernel, feat = outputs
    terms = []
    for i in range(len(feat)):
        used = targets["pair_weight"][i] > 0
        kernels = kernel[i, targets["pair_cell"][i][used]]
        soft = (kernels @ feat[i].flatten(1)).sigmoid()
        mask = targets["masks"][i, targets["pair_instance"][i][used]].flatten(1)
        below = (soft * soft).sum(1) + (mask * mask).sum(1) + 2e-3
        terms.append(1 - 2 * (soft * mask).sum(1) / below)
    weights = config["loss"]
    dice = weights["dice_weight"] * torch.cat(terms).mean()

    labels = F.one_hot(targets["cate"].long(), cate.shape[2] + 1)[..., :-1]
    labels = labels.to(cate.dtype)
    entropy = F.binary_cross_entropy_with_logits(cate, labels, reduction="none")
    score = cate.sigmoid()
    wrong = torch.where(labels > 0, 1 - score, score)
    alpha = weights["focal_alpha"]
    balance = torch.where(labels > 0, alpha, 1 - alpha)
    focal = (balance * wrong ** weights["focal_gamma"] * entropy).sum()
    return dice, weights["focal_weight"] * focal / (targets["num_cells"].sum() + 1)
