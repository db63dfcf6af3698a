"""Worker of the PyTorch peers; runs in their environment.

python benchmarks/torch_side.py network --form channels_last --case FOLDER
"""

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import worker


def load_arrays(case: Path) -> dict[str, Any]:
    """Returns the case's arrays."""
    import numpy as np

    with np.load(case / "arrays.npz") as arrays:
        return dict(arrays)


def about(first_call_s: float) -> dict[str, Any]:
    """Returns versions, threads and the first call's time."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "versions": versions,
        "threads": torch.get_num_threads(),
        "first_call_s": first_call_s,
    }


def load_mmdet(case: Path, form: str) -> tuple[Any, Any]:
    """Returns (model, function from normalised images to the head's raw outputs)."""
    import mmdet_model
    import torch

    model = mmdet_model.build(case)
    if form in ("channels_last", "fused"):
        model = model.to(memory_format=torch.channels_last)
    if form == "fused":
        from mmcv.cnn import fuse_conv_bn

        model.backbone = fuse_conv_bn(model.backbone)

    def forward(image: Any) -> Any:
        return model.mask_head(model.extract_feat(image))

    return model, torch.compile(forward) if form == "compile" else forward


def normalized(model: Any, arrays: Any, form: str) -> Any:
    """Returns the network's input, in the form's memory layout."""
    import mmdet_model
    import torch

    data = dict(inputs=mmdet_model.pixels(arrays), data_samples=None)
    image = model.data_preprocessor(data)["inputs"]
    last = form in ("channels_last", "fused")
    return image.contiguous(memory_format=torch.channels_last) if last else image


def compile_counter() -> Any:
    """Returns a function that counts what torch.compile compiled so far."""
    from torch._dynamo.utils import counters

    return lambda: int(counters["stats"]["unique_graphs"])


def network(case: Path, form: str) -> worker.Work:
    """The network alone, from normalised pixels to its raw outputs."""
    import torch

    model, forward = load_mmdet(case, form)
    image = normalized(model, load_arrays(case), form)
    last: list[Any] = []

    @torch.inference_mode()
    def run() -> None:
        last[:] = [forward(image)]

    first = worker.first_call(run)

    def found() -> dict[str, float]:
        kernels, classes, feat = last[0]
        values = ([x.flatten(2) for x in classes], [x.flatten(2) for x in kernels])
        cate, kernel = (torch.cat(x, 2) for x in values)
        return outputs_of(cate.numpy(), kernel.numpy(), feat.numpy())

    return worker.Work(run, about(first), compile_counter(), found)


def outputs_of(cate: Any, kernel: Any, mask_feat: Any) -> dict[str, float]:
    """Returns the mean size of each output: equal work has equal outputs."""
    import numpy as np

    outputs = {"cate": cate, "kernel": kernel, "mask_feat": mask_feat}
    return {k: float(np.abs(x).mean()) for k, x in outputs.items()}


def image(case: Path, form: str) -> worker.Work:
    """From uint8 pixels of the network's size to masks of the image's size."""
    import mmdet_model
    import torch

    arrays = load_arrays(case)
    model, forward = load_mmdet(case, form)
    inputs, samples = mmdet_model.pixels(arrays), mmdet_model.samples(arrays, False)
    metas = [sample.metainfo for sample in samples]
    last: list[Any] = []
    layout = torch.contiguous_format
    if form in ("channels_last", "fused"):
        layout = torch.channels_last

    @torch.inference_mode()
    def run() -> None:
        data = model.data_preprocessor(dict(inputs=inputs, data_samples=None))
        pixels = data["inputs"].contiguous(memory_format=layout)
        outputs = forward(pixels)
        last[:] = [model.mask_head.predict_by_feat(*outputs, batch_img_metas=metas)]

    first = worker.first_call(run)

    @torch.inference_mode()
    def found() -> dict[str, Any]:
        outputs = forward(normalized(model, arrays, form))
        return found_in(last[0], candidates(model.mask_head, outputs[1]))

    return worker.Work(run, about(first), compile_counter(), found)


def candidates(head: Any, classes: Any) -> list[int]:
    """Returns how many cells and classes of each image are looked at."""
    import torch.nn.functional as F

    total = 0
    for level in classes:
        scores = level.sigmoid()
        highest = F.max_pool2d(scores, 2, stride=1, padding=1)[:, :, :-1, :-1]
        chosen = (scores > head.test_cfg.score_thr) & (highest == scores)
        total = total + chosen.sum((1, 2, 3))
    return total.tolist()


def found_in(results: Any, num_candidates: list[int]) -> dict[str, Any]:
    """Returns what a prediction holds, to compare programs by."""
    return {
        "candidates": num_candidates,
        "detections": [len(r.scores) for r in results],
        "classes": [sorted(r.labels.tolist()) for r in results],
        "mask_pixels": int(sum(r.masks.sum() for r in results)),
    }


def time_module(module: Any, name: str, current: list[worker.Stages]) -> None:
    """Adds a module's time to the stage `name` of `current[0]`, by hooks."""
    started: list[float] = []

    def enter(*_: Any) -> None:
        started.append(time.perf_counter())

    def leave(*_: Any) -> None:
        current[0].add(name, time.perf_counter() - started.pop())

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def stages(case: Path, form: str) -> worker.Work:
    """The network's parts, then post-processing and pasting."""
    import mmdet_model
    import torch

    arrays = load_arrays(case)
    model, _ = load_mmdet(case, form)
    if form == "compile":
        raise ValueError("a compiled network has no stages")
    pixels = normalized(model, arrays, form)
    head = model.mask_head
    metas = [s.metainfo for s in mmdet_model.samples(arrays, False)]
    current: list[worker.Stages] = []
    time_module(head.mask_feature_head, "mask_head", current)

    @torch.inference_mode()
    def run() -> dict[str, float]:
        current[:] = [timed] = [worker.Stages()]
        with timed("backbone"):
            features = model.backbone(pixels)
        with timed("fpn"):
            features = model.neck(features)
        with timed("ins_head"):
            outputs = head(features)
        timed.add("ins_head", -timed.seconds["mask_head"])
        finish(head, outputs, metas, timed)
        return timed.seconds

    first = worker.first_call(run)
    return worker.Work(run, about(first))


def finish(head: Any, outputs: Any, metas: Any, timed: worker.Stages) -> Any:
    """Returns the predictions; notes what comes before enlarging the masks, and after.

    The head enlarges masks with its module's only two calls of `F.interpolate`.
    """
    from mmdet.models.dense_heads import solov2_head

    functional = solov2_head.F
    started: list[float] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            if name == "interpolate" and not started:
                started.append(time.perf_counter())
            return getattr(functional, name)

    single = head._predict_by_feat_single

    def watched_single(*args: Any, **kwargs: Any) -> Any:
        result = single(*args, **kwargs)
        if started:
            timed.add("pasting", time.perf_counter() - started.pop())
        return result

    solov2_head.F, head._predict_by_feat_single = Watched(), watched_single
    try:
        with timed("post-processing"):
            kernels, classes, feat = outputs
            lists = list(kernels), list(classes)
            results = head.predict_by_feat(*lists, feat, batch_img_metas=metas)
    finally:
        solov2_head.F, head._predict_by_feat_single = functional, single
    timed.add("post-processing", -timed.seconds.get("pasting", 0.0))
    return results


def postprocess(case: Path, form: str) -> worker.Work:
    """Post-processing and pasting of given outputs."""
    import mmdet_model
    import torch

    arrays = load_arrays(case)
    head = mmdet_model.build(case).mask_head
    layout = torch.channels_last if form == "channels_last" else torch.contiguous_format
    cells = [g * g for g in head.num_grids]

    def levels(name: str) -> list[Any]:
        parts = torch.from_numpy(arrays[name]).split(cells, dim=1)
        grids = zip(parts, head.num_grids, strict=True)
        maps = [x.reshape(len(x), g, g, -1).permute(0, 3, 1, 2) for x, g in grids]
        return [x.contiguous(memory_format=layout) for x in maps]

    feat = torch.from_numpy(arrays["mask_feat"]).permute(0, 3, 1, 2)
    outputs = levels("kernel"), levels("cate"), feat.contiguous(memory_format=layout)
    metas = [s.metainfo for s in mmdet_model.samples(arrays, False)]
    last: list[Any] = []

    @torch.inference_mode()
    def run() -> dict[str, float]:
        timed = worker.Stages()
        last[:] = [finish(head, outputs, metas, timed)]
        return timed.seconds

    first = worker.first_call(run)

    def found() -> dict[str, Any]:
        return found_in(last[0], candidates(head, outputs[1]))

    return worker.Work(run, about(first), found=found)


def train(case: Path, form: str) -> worker.Work:
    """Forward, loss with its targets, backward and update."""
    import torch_train

    make = torch_train.plain if form.startswith("plain") else torch_train.mmdet
    run, found = make(case, load_arrays(case), form)
    first = worker.first_call(run)
    return worker.Work(run, about(first), compile_counter(), found)


def export(case: Path) -> None:
    """Writes the network as ONNX, for the runtimes."""
    import torch

    model, _ = load_mmdet(case, "eager")
    image = normalized(model, load_arrays(case), "eager")

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, image: Any) -> Any:
            kernels, classes, feat = self.model.mask_head(self.model.extract_feat(image))
            flat = [torch.cat([x.flatten(2) for x in v], 2) for v in (classes, kernels)]
            return *flat, feat

    path = case / "network.onnx"
    names = ["cate", "kernel", "mask_feat"]
    torch.onnx.export(Network().eval(), (image,), path, output_names=names, dynamo=False)
    import numpy as np

    np.save(case / "network_input.npy", image.numpy())


KINDS = {f.__name__: f for f in (network, image, stages, postprocess, train)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=[*sorted(KINDS), "export"])
    parser.add_argument("--form", default="eager")
    parser.add_argument("--case", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.kind == "export":
        export(arguments.case)
    else:
        load = KINDS[arguments.kind]
        worker.serve(lambda: load(arguments.case, arguments.form))
