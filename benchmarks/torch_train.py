"""Train steps of the PyTorch peers: mmdetection's own, and plain torch's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Step = tuple[Callable[[], dict[str, float] | None], Callable[[], dict[str, Any]]]


def optimizer(named: dict[str, torch.Tensor], config: Any) -> torch.optim.SGD:
    """Returns SGD at the warm-up's first rate, without weight decay on norms."""
    optim = config["optim"]
    norms = [p for p in named.values() if p.ndim == 1]
    others = [p for p in named.values() if p.ndim > 1]
    groups = [
        dict(params=others, weight_decay=optim["weight_decay"]),
        dict(params=norms, weight_decay=optim["weight_decay_norm"]),
    ]
    rate = optim["learning_rate"] * optim["warmup_factor"]
    return torch.optim.SGD(groups, lr=rate, momentum=optim["momentum"])


def mmdet(case: Path, arrays: Any, form: str) -> Step:
    """Returns (one step, what the first one found) of mmdetection's model.

    The step takes what the data loader gives it: uint8 images and whole masks, which
    the loss scales down. That part is timed apart, as the stage "targets".
    """
    import mmdet_model
    import worker

    config = json.loads((case / "config.json").read_text())
    model = mmdet_model.build(case)
    layout = torch.contiguous_format
    if form == "channels_last":
        layout = torch.channels_last
    model = model.to(memory_format=layout).train()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sgd = optimizer(named, config)
    current, pairs, losses = [], [], []
    targets = model.mask_head._get_targets_single

    def timed_targets(*args: Any, **kwargs: Any) -> Any:
        with current[0]("targets"):
            found = targets(*args, **kwargs)
        pairs.append(sum(len(level) for level in found[3]))
        return found

    model.mask_head._get_targets_single = timed_targets
    inputs = mmdet_model.pixels(arrays)
    samples = mmdet_model.samples(arrays, training=True)

    def run() -> dict[str, float]:
        current[:] = [worker.Stages()]
        pairs.clear()
        data = dict(inputs=inputs, data_samples=samples)
        data = model.data_preprocessor(data, training=True)
        image = data["inputs"].contiguous(memory_format=layout)
        parts = model.loss(image, data["data_samples"])
        sgd.zero_grad(set_to_none=True)
        (parts["loss_mask"] + parts["loss_cls"]).backward()
        sgd.step()
        losses.append((parts["loss_mask"].item(), parts["loss_cls"].item()))
        return current[0].seconds

    def found() -> dict[str, Any]:
        dice, focal = losses[0]
        return {"loss_ins": dice, "loss_cate": focal, "num_pairs": float(sum(pairs))}

    return run, found


def plain(case: Path, arrays: Any, form: str) -> Step:
    """Returns (one step, what the first one found) of `torch_plain.py`."""
    import torch_plain

    config = json.loads((case / "config.json").read_text())
    weights = json.loads((case / "weights.json").read_text())
    layout = torch.contiguous_format
    if form == "plain_channels_last":
        layout = torch.channels_last
    with np.load(weights["adelaidet"]) as file:
        state = {name: torch.from_numpy(file[name]) for name in file.files}
    for name, value in state.items():
        if value.ndim == 4:
            state[name] = value.contiguous(memory_format=layout)
    named = trainable(state, config["model"]["backbone"]["freeze_at"])
    for value in named.values():
        value.requires_grad_()
    sgd = optimizer(named, config)
    names = ("cate", "pair_cell", "pair_instance", "pair_weight", "num_cells")
    targets = {name: torch.from_numpy(arrays[f"target_{name}"]) for name in names}
    targets["masks"] = torch.from_numpy(arrays["masks"]).float()
    image, network = prepare(config, arrays, layout), torch_plain.Network(config, state)

    def loss() -> tuple[torch.Tensor, torch.Tensor]:
        return torch_plain.solov2_loss(network(image()), targets, config)

    compute = torch.compile(loss) if form == "plain_compile" else loss
    losses = []

    def run() -> None:
        dice, focal = compute()
        sgd.zero_grad(set_to_none=True)
        (dice + focal).backward()
        sgd.step()
        losses.append((dice.item(), focal.item()))

    def found() -> dict[str, Any]:
        pairs = float((targets["pair_weight"] > 0).sum())
        dice, focal = losses[0]
        return {"loss_ins": dice, "loss_cate": focal, "num_pairs": pairs}

    return run, found


def trainable(state: dict[str, torch.Tensor], freeze_at: int) -> dict[str, Any]:
    """Returns the weights that training changes."""
    frozen = ("stem", "res2", "res3", "res4", "res5")[:freeze_at]
    fixed = tuple(f"backbone.bottom_up.{stage}." for stage in frozen)
    return {
        name: value
        for name, value in state.items()
        if not name.startswith(fixed)
        and not (name.startswith("backbone.bottom_up") and ".norm." in name)
    }


def prepare(config: Any, arrays: Any, layout: Any) -> Callable[[], torch.Tensor]:
    """Returns a function that normalises and pads the uint8 images, as a step does."""
    images = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2)
    mean = torch.tensor(config["input"]["mean"])[None, :, None, None]
    std = torch.tensor(config["input"]["std"])[None, :, None, None]
    sizes = arrays["image_size"].tolist()

    def normalize() -> torch.Tensor:
        pixels = (images.float() - mean) / std
        for i, (h, w) in enumerate(sizes):
            pixels[i, :, h:] = 0
            pixels[i, :, :, w:] = 0
        return pixels.contiguous(memory_format=layout)

    return normalize
