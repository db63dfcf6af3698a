"""mmdetection's own training loop on a case's data, from a case's weights; in its environment.

python benchmarks/torch_train.py --case FOLDER --output FOLDER

Its pipeline, its SOLOv2, its runner; schedule, sizes, batch and number of images are those of
the case's config. Every `train.eval_every` steps the validation images are predicted into
predictions_STEP.json, and curve.jsonl gets the step and the seconds of training until then.
A run that was stopped goes on from its last evaluation; its order of images is then another.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_peer import Case, build_mmdet


def make_settings(case: Case, output: Path) -> dict[str, Any]:
    """Returns what mmengine's runner is built from, besides the model."""
    config = case.config
    values, train, optim = config["input"], config["train"], config["optim"]
    (images, annotations), _ = json.loads((case.folder / "data.json").read_text())
    names = tuple(json.loads((case.folder / "classes.json").read_text()))
    scales = [(values["max_size_train"], short) for short in values["min_sizes_train"]]
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        {"type": "RandomChoiceResize", "scales": scales, "keep_ratio": True},
        {"type": "RandomFlip", "prob": values["flip_prob"]},
        {"type": "PackDetInputs"},
    ]
    dataset = {
        "type": "CocoDataset",
        "ann_file": annotations,
        "data_prefix": {"img": images},
        "metainfo": {"classes": names},
        "filter_cfg": {"filter_empty_gt": not config["data"]["keep_empty"], "min_size": 0},
        "pipeline": pipeline,
    }
    saving = {"interval": train["eval_every"], "max_keep_ckpts": 1}
    return {
        "work_dir": str(output),
        "train_dataloader": {
            "batch_size": train["batch_size"],
            "num_workers": 0,
            "sampler": {"type": "InfiniteSampler", "shuffle": True},
            "dataset": dataset,
        },
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": train["steps"]},
        "optim_wrapper": {
            "type": "OptimWrapper",
            "optimizer": make_optimizer(optim),
            "paramwise_cfg": {"norm_decay_mult": 0.0},
            "clip_grad": {"max_norm": optim["clip_norm"]} if optim["clip_norm"] else None,
        },
        "param_scheduler": make_schedule(optim),
        "default_hooks": {
            "checkpoint": {"type": "CheckpointHook", "by_epoch": False, **saving},
            "logger": {"type": "LoggerHook", "interval": 50},
        },
        "randomness": {"seed": config["seed"]},
        "default_scope": "mmdet",
        "experiment_name": "peer",
        "resume": (output / "last_checkpoint").is_file(),
        "cfg": {},
    }


def make_optimizer(optim: Any) -> dict[str, Any]:
    """Returns SGD or AdamW; the momentum is Adam's first beta, as in the config."""
    rule = {"lr": optim["learning_rate"], "weight_decay": optim["weight_decay"]}
    if optim["name"] == "sgd":
        return {"type": "SGD", "momentum": optim["momentum"], **rule}
    return {"type": "AdamW", "betas": (optim["momentum"], 0.999), **rule}


def make_schedule(optim: Any) -> list[dict[str, Any]]:
    """Returns the warm-up and the falls of the rate."""
    warmup = int(optim["warmup_steps"])
    schedule: list[dict[str, Any]] = []
    if warmup:
        factor = optim["warmup_factor"]
        rise = {"type": "LinearLR", "start_factor": factor, "begin": 0, "end": warmup}
        schedule.append({**rise, "by_epoch": False})
    falls = {"type": "MultiStepLR", "milestones": list(optim["milestones"])}
    schedule.append({**falls, "gamma": optim["gamma"], "by_epoch": False})
    return schedule


def predict(model: Any, case: Case, path: Path) -> None:
    """Predicts the validation images as mmdetection's test pipeline does, to COCO results."""
    import mmcv
    from mmdet.structures import DetDataSample
    from pycocotools.mask import encode

    _, (images, annotations) = json.loads((case.folder / "data.json").read_text())
    content = json.loads(Path(annotations).read_text())
    ids = sorted(category["id"] for category in content["categories"])
    size = case.config["input"]["max_size_test"], case.config["input"]["min_size_test"]
    entries = []
    for record in content["images"]:
        picture = mmcv.imread(Path(images) / record["file_name"])
        resized, factor = mmcv.imrescale(picture, size, return_scale=True)
        shapes = {"img_shape": resized.shape[:2], "ori_shape": picture.shape[:2]}
        sample = DetDataSample(metainfo={**shapes, "scale_factor": (factor, factor)})
        inputs = [torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))]
        data = model.data_preprocessor({"inputs": inputs, "data_samples": [sample]}, training=False)
        with torch.inference_mode():
            (result,) = model.predict(data["inputs"], data["data_samples"])
        found = result.pred_instances
        masks = np.asfortranarray(found.masks.cpu().numpy().transpose(1, 2, 0).astype(np.uint8))
        rles = [{**rle, "counts": rle["counts"].decode()} for rle in encode(masks)]
        for label, score, rle in zip(
            found.labels.tolist(), found.scores.tolist(), rles, strict=True
        ):
            entry = {"image_id": record["id"], "category_id": ids[label]}
            entries.append({**entry, "score": score, "segmentation": rle})
    path.write_text(json.dumps(entries))


def run(case: Case, output: Path) -> None:
    """Trains to the end, or goes on."""
    output.mkdir(parents=True, exist_ok=True)
    model = build_mmdet(case)  # before the imports: it stands in for mmcv's operators
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    steps, every = case.config["train"]["steps"], case.config["train"]["eval_every"]
    curve = output / "curve.jsonl"
    lines = [json.loads(x) for x in curve.read_text().splitlines()] if curve.is_file() else []

    class Curve(Hook):
        """Counts the seconds of training, without those of evaluations."""

        def before_train(self, runner: Any) -> None:
            self.spent = lines[-1]["seconds"] if lines else 0.0
            self.start = time.perf_counter()

        def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
            step = runner.iter + 1
            if step % every and step != steps:
                return
            seconds = self.spent = self.spent + time.perf_counter() - self.start
            runner.model.eval()
            predict(runner.model, case, output / f"predictions_{step}.json")
            runner.model.train()
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            if torch.cuda.is_available():
                memory = torch.cuda.max_memory_allocated() / 2**30
            with open(curve, "a") as file:
                line = {"step": step, "seconds": seconds, "memory_gb": memory}
                file.write(json.dumps(line) + "\n")
            self.start = time.perf_counter()

    sys.modules.pop("mmcv._ext", None)  # the runner asks whether there are operators
    model.init_weights = lambda: None  # the runner would draw the heads' weights anew
    runner = Runner(model=model, custom_hooks=[], **make_settings(case, output))
    runner.register_hook(Curve(), priority="VERY_LOW")
    runner.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    run(Case(arguments.case, "eager"), arguments.output)
