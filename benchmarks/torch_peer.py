"""The peers' programs: mmdetection, ONNX Runtime, OpenVINO; run in their environment.

python benchmarks/torch_peer.py network --form channels_last --case FOLDER
"""

import argparse
import json
import os
import platform
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from harness import Stages, Work, serve

FIELDS = ("cate", "kernel", "mask_feat")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Case:
    """A case's config and arrays in one of torch's forms."""

    def __init__(self, folder: Path, form: str):
        self.folder, self.form = folder, form
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = json.loads((folder / "weights.json").read_text())
        self.arrays: dict[str, Any] = {}  # none where it trains on files
        if (folder / "arrays.npz").is_file():
            with np.load(folder / "arrays.npz") as arrays:
                self.arrays = dict(arrays)
        last = form in ("channels_last", "fused")
        self.layout = torch.channels_last if last else torch.contiguous_format
        self.low = self.config["model"]["dtype"] == "bfloat16"

    def in_layout(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(DEVICE).contiguous(memory_format=self.layout)

    def work(self, run: Callable[[], Any], describe: Any = lambda result: {}, **more: Any) -> Work:
        """Returns the work in the config's precision, until the device has done it."""
        from torch._dynamo.utils import counters

        def compiles() -> int:
            return int(counters["stats"]["unique_graphs"])

        def run_to_end() -> Any:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.low):
                result = run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            return result

        versions = {"python": platform.python_version(), "torch": torch.__version__}
        about = {"versions": versions, "threads": torch.get_num_threads(), "device": str(DEVICE)}
        return Work(run_to_end, describe, about=about, compiles=compiles, **more)

    def optimizer(self, named: dict[str, torch.Tensor]) -> torch.optim.SGD:
        """Returns SGD at the warm-up's first rate, without weight decay on norms."""
        optim = self.config["optim"]
        decays = {False: optim["weight_decay"], True: optim["weight_decay_norm"]}
        groups = [
            {"params": [p for p in named.values() if (p.ndim == 1) == norms], "weight_decay": decay}
            for norms, decay in decays.items()
        ]
        rate = optim["learning_rate"] * optim["warmup_factor"]
        return torch.optim.SGD(groups, lr=rate, momentum=optim["momentum"])


def mean_sizes(*outputs: Any) -> dict[str, float]:
    """Returns the mean size of each output: equal work has equal outputs."""
    return {k: float(abs(x).mean()) for k, x in zip(FIELDS, outputs, strict=True)}


# --- mmdetection's SOLOv2 ------------------------------------------------------------


class _NoOperators(types.ModuleType):
    """In place of `mmcv._ext`, which mmdetection imports, and mmcv-lite and SOLOv2 lack."""

    __file__ = "<no operators>"  # what asks for a module's source wants a name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(f"mmcv-lite has no operator {name}")

        return missing


def build_mmdet(case: Case) -> Any:
    """Returns the model in evaluation mode, every weight filled, in the case's form."""
    sys.modules.setdefault("mmcv._ext", _NoOperators("mmcv._ext"))
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules(init_default_scope=True)
    folder = Path(mmdet.__file__).parent / ".mim" / "configs" / "solov2"
    settings = Config.fromfile(folder / "solov2_r50_fpn_1x_coco.py").model
    _copy_settings(settings, case.config)
    model = MODELS.build(settings)
    with np.load(case.weights["mmdet"]) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [n for n in missing if not n.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"weights do not fit: {missing=}, {unexpected=}")
    model = model.eval().to(DEVICE, memory_format=case.layout)
    if case.form == "fused":
        from mmcv.cnn import fuse_conv_bn

        model.backbone = fuse_conv_bn(model.backbone)
    return model


def _copy_settings(settings: Any, config: Any) -> None:
    """Makes mmdetection's model settings say what our config says; in place."""
    network, test = config["model"], config["test"]
    backbone, head, channels = network["backbone"], network["ins_head"], network["fpn"]["channels"]
    deep = backbone["depth"] >= 50
    settings.backbone.update(
        depth=backbone["depth"],
        init_cfg=None,
        frozen_stages=backbone["freeze_at"] - 1,
        norm_cfg={"type": "BN", "requires_grad": False},
        norm_eval=True,
        style="caffe" if deep and backbone["stride_in_1x1"] else "pytorch",
    )
    inputs = settings.neck.in_channels if deep else [64, 128, 256, 512]
    settings.neck.update(in_channels=inputs, out_channels=channels)
    settings.mask_head.update(
        num_classes=network["num_classes"],
        in_channels=channels,
        feat_channels=head["channels"],
        stacked_convs=head["num_convs"],
        num_grids=list(head["num_grids"]),
        scale_ranges=config["targets"]["scale_ranges"],
        pos_scale=config["targets"]["sigma"],
        norm_cfg={"type": "GN", "num_groups": 32, "requires_grad": True},
    )
    settings.mask_head.mask_feature_head.update(
        feat_channels=network["mask_head"]["channels"], out_channels=head["num_kernels"]
    )
    means = {"mean": config["input"]["mean"], "std": config["input"]["std"]}
    settings.data_preprocessor.update(bgr_to_rgb=False, **means)
    settings.test_cfg.update(
        nms_pre=test["nms_pre"],
        score_thr=test["score_threshold"],
        mask_thr=test["mask_threshold"],
        filter_thr=test["update_threshold"],
        kernel=test["nms_kernel"],
        sigma=test["nms_sigma"],
        max_per_img=test["max_per_image"],
    )


def samples(arrays: Any, training: bool = False) -> list[Any]:
    """Returns mmdetection's sample of each image, with its objects if training."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    made = []
    for i, (h, w) in enumerate(arrays["image_size"].tolist()):
        sample = DetDataSample(metainfo={"img_shape": (h, w), "ori_shape": (h, w), "img_id": i})
        if training:
            sample.gt_instances = InstanceData(
                bboxes=torch.from_numpy(arrays["boxes"][i]),
                labels=torch.from_numpy(arrays["labels"][i]).long(),
                masks=BitmapMasks(arrays["full_masks"][i], h, w),
            )
        made.append(sample)
    return made


def preprocess(case: Case, model: Any, objects: Any = None) -> tuple[torch.Tensor, Any]:
    """Returns the network's input, from uint8 [3, H, W] as mmdetection's pipeline gives it,
    and the samples on the device."""
    images = zip(case.arrays["image"], case.arrays["image_size"].tolist(), strict=True)
    inputs = [
        torch.from_numpy(np.ascontiguousarray(image[:h, :w].transpose(2, 0, 1)))
        for image, (h, w) in images
    ]
    data = {"inputs": inputs, "data_samples": objects}
    data = model.data_preprocessor(data, training=objects is not None)
    return case.in_layout(data["inputs"]), data["data_samples"]


def _forward(case: Case, model: Any) -> Callable[[torch.Tensor], Any]:
    def forward(image: torch.Tensor) -> Any:
        return model.mask_head(model.extract_feat(image))

    return torch.compile(forward) if case.form == "compile" else forward


def network(case: Case) -> Work:
    """The network alone, from normalised pixels to its raw outputs."""
    if case.form in ("onnxruntime", "openvino"):
        return _runtime(case)
    model = build_mmdet(case)
    (image, _), forward = preprocess(case, model), _forward(case, model)

    def describe(outputs: Any) -> dict[str, float]:
        kernels, classes, feat = outputs
        cate, kernel = (torch.cat([x.flatten(2) for x in v], 2) for v in (classes, kernels))
        return mean_sizes(cate, kernel, feat)

    return case.work(torch.inference_mode()(lambda: forward(image)), describe)


def image(case: Case) -> Work:
    """From uint8 pixels of the network's size to masks of the image's size."""
    model = build_mmdet(case)
    forward, head = _forward(case, model), model.mask_head
    metas = [sample.metainfo for sample in samples(case.arrays)]

    @torch.inference_mode()
    def run() -> Any:
        outputs = forward(preprocess(case, model)[0])
        return head.predict_by_feat(*outputs, batch_img_metas=metas)

    @torch.inference_mode()
    def describe(predictions: Any) -> dict[str, Any]:
        classes = forward(preprocess(case, model)[0])[1]
        return describe_predictions(head, predictions, classes)

    return case.work(run, describe)


def describe_predictions(head: Any, predictions: Any, classes: Any) -> dict[str, Any]:
    """Returns what a prediction holds, to compare programs by."""
    candidates = 0
    for level in classes:
        scores = level.sigmoid()
        highest = F.max_pool2d(scores, 2, stride=1, padding=1)[:, :, :-1, :-1]
        chosen = (scores > head.test_cfg.score_thr) & (highest == scores)
        candidates = candidates + chosen.sum((1, 2, 3))
    return {
        "candidates": candidates.tolist(),
        "detections": [len(p.scores) for p in predictions],
        "classes": [sorted(p.labels.tolist()) for p in predictions],
        "mask_pixels": int(sum(p.masks.sum() for p in predictions)),
    }


def stages(case: Case) -> Work:
    """The network's parts, then post-processing and pasting."""
    model, timed, started = build_mmdet(case), Stages(), []
    (image, _), head = preprocess(case, model), model.mask_head
    metas = [sample.metainfo for sample in samples(case.arrays)]
    part = head.mask_feature_head  # it is called within the head
    part.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))
    part.register_forward_hook(
        lambda *_: timed.add("mask_head", time.perf_counter() - started.pop())
    )

    @torch.inference_mode()
    def run() -> None:
        with timed("backbone"):
            features = model.backbone(image)
        with timed("fpn"):
            features = model.neck(features)
        with timed("ins_head"):
            outputs = head(features)
        timed.add("ins_head", -timed.seconds["mask_head"])
        finish(head, outputs, metas, timed)

    return case.work(run, stages=timed)


def finish(head: Any, outputs: Any, metas: Any, timed: Stages) -> Any:
    """Returns one image's predictions; times what comes before enlarging the masks, and after.

    The head enlarges masks with its only two calls of `F.interpolate`.
    """
    enlarge, calls = F.interpolate, []

    def interpolate(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(time.perf_counter())
        return enlarge(*args, **kwargs)

    kernels, classes, feat = outputs
    start = time.perf_counter()
    with mock.patch.object(F, "interpolate", interpolate):
        results = head.predict_by_feat(list(kernels), list(classes), feat, batch_img_metas=metas)
    end = time.perf_counter()
    pasting = end - calls[0] if calls else 0.0
    timed.add("post-processing", end - start - pasting)
    timed.add("pasting", pasting)
    return results


def postprocess(case: Case) -> Work:
    """Post-processing and pasting of given outputs."""
    head, timed = build_mmdet(case).mask_head, Stages()
    metas = [sample.metainfo for sample in samples(case.arrays)]

    def levels(name: str) -> list[torch.Tensor]:
        parts = torch.from_numpy(case.arrays[name]).split([g * g for g in head.num_grids], dim=1)
        grids = zip(parts, head.num_grids, strict=True)
        return [case.in_layout(x.reshape(len(x), g, g, -1).permute(0, 3, 1, 2)) for x, g in grids]

    feat = case.in_layout(torch.from_numpy(case.arrays["mask_feat"]).permute(0, 3, 1, 2))
    kernels, classes = levels("kernel"), levels("cate")
    run = torch.inference_mode()(lambda: finish(head, (kernels, classes, feat), metas, timed))
    return case.work(run, lambda made: describe_predictions(head, made, classes), stages=timed)


def train(case: Case) -> Work:
    """Forward, loss with its targets, backward and update."""
    model, timed, first = build_mmdet(case).train(), Stages(), {}
    sgd = case.optimizer({n: p for n, p in model.named_parameters() if p.requires_grad})
    make_targets, counts = model.mask_head._get_targets_single, {"pairs": 0, "cells": 0}

    def timed_targets(*args: Any, **kwargs: Any) -> Any:
        with timed("targets"):
            targets = make_targets(*args, **kwargs)
        if not first:
            counts["pairs"] += sum(len(level) for level in targets[3])
            counts["cells"] += sum(int(level.sum()) for level in targets[2])
        return targets

    model.mask_head._get_targets_single = timed_targets
    objects = samples(case.arrays, training=True)

    def run() -> None:
        losses = model.loss(*preprocess(case, model, objects))
        sgd.zero_grad(set_to_none=True)
        (losses["loss_mask"] + losses["loss_cls"]).backward()
        sgd.step()
        first.setdefault("loss", (losses["loss_mask"].item(), losses["loss_cls"].item()))

    def describe(_: None) -> dict[str, float]:
        # It divides the sum over pairs by the number of cells, of which two objects
        # may have hit one; here it is the mean over pairs, as the others'.
        dice, focal = first["loss"]
        dice *= counts["cells"] / counts["pairs"]
        return {"loss_ins": dice, "loss_cate": focal, "num_pairs": float(counts["pairs"])}

    return case.work(run, describe, stages=timed)


# --- ONNX Runtime and OpenVINO: the exported network alone, in float32 ---------------


def export(case: Case) -> None:
    """Writes mmdetection's network as ONNX."""
    model = build_mmdet(case)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: torch.Tensor) -> Any:
            kernels, classes, feat = self.model.mask_head(self.model.extract_feat(image))
            flat = [torch.cat([x.flatten(2) for x in v], 2) for v in (classes, kernels)]
            return *flat, feat

    (image, _), path = preprocess(case, model), case.folder / "network.onnx"
    options = {"output_names": list(FIELDS), "dynamo": False}
    torch.onnx.export(Network().eval(), (image,), path, **options)
    np.save(case.folder / "network_input.npy", image.numpy())


def _runtime(case: Case) -> Work:
    path, image = str(case.folder / "network.onnx"), np.load(case.folder / "network_input.npy")
    versions, threads = {"python": platform.python_version()}, len(os.sched_getaffinity(0))
    if case.form == "onnxruntime":
        import onnxruntime

        versions["onnxruntime"] = onnxruntime.__version__
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run() -> list[np.ndarray]:
            return session.run(list(FIELDS), {name: image})
    else:
        import openvino

        versions["openvino"] = openvino.__version__
        # Its default on processors with bfloat16 instructions is to compute in bfloat16.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        model = openvino.Core().compile_model(path, "CPU", settings)
        request = model.create_infer_request()
        threads = int(model.get_property("INFERENCE_NUM_THREADS"))

        def run() -> list[np.ndarray]:
            request.infer([image], share_inputs=True)
            return [request.get_tensor(model.output(name)).data for name in FIELDS]

    about = {"versions": versions, "threads": threads}
    return Work(run, lambda outputs: mean_sizes(*outputs), about=about)


KINDS = {f.__name__: f for f in (network, image, stages, postprocess, train)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=[*sorted(KINDS), "export"])
    parser.add_argument("--form", default="eager")
    parser.add_argument("--case", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.kind == "export":
        export(Case(arguments.case, "eager"))
    else:
        serve(lambda: KINDS[arguments.kind](Case(arguments.case, arguments.form)))
