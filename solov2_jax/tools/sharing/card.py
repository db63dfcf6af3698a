"""The model card of a run: README.md with the head that the hub reads."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from solov2_jax.io import printable

_SHOWN = ("segm/AP", "segm/AP50", "segm/AP75", "segm/APs", "segm/APm", "segm/APl", "bbox/AP")
_MOST_CLASSES = 100


def model_card(
    repo: str,
    config: Mapping[str, Any],
    class_names: Sequence[str],
    about: Mapping[str, Any],
    licence: str,
) -> str:
    """Returns the text.

    Args:
      config: the run's.
      about: see `describe.describe_run`.
      licence: of these weights; "": nothing is said.
    """
    head = yaml.safe_dump(_head(repo, about, licence), sort_keys=False, allow_unicode=True)
    name = repo.rpartition("/")[2]
    sections = [
        f"# {name}",
        "SOLOv2 instance segmentation, trained with solov2_jax. Classes "
        f"({len(class_names)}): {_classes(class_names)}.",
        _use(repo),
        _measured(about),
        _data(about),
        _settings(config, about),
        _licence(about, licence),
    ]
    return f"---\n{head}---\n\n" + "\n\n".join(sections) + "\n"


def _head(repo: str, about: Mapping[str, Any], licence: str) -> dict[str, Any]:
    head: dict[str, Any] = {"license": licence} if licence else {}
    head |= {
        "library_name": "solov2_jax",
        "pipeline_tag": "image-segmentation",
        "tags": ["instance-segmentation", "solov2", "jax", "flax"],
        "metrics": ["mean_average_precision"],
    }
    name = about["origin"].get("name", "")
    if based := re.match(r"(?:hf:)?([\w.-]+/[\w.-]+)", name):
        if about["origin"].get("revision") and not name.startswith("torchvision/"):
            head["base_model"] = based[1]
    scores = [
        {"type": "mean_average_precision", "name": key, "value": round(value, 4)}
        for key, value in about["metrics"].items()
        if key in _SHOWN
    ]
    if scores:
        dataset = about["data"]["name"] or "validation data"
        head["model-index"] = [
            {
                "name": repo.rpartition("/")[2],
                "results": [
                    {
                        "task": {"type": "image-segmentation", "name": "Instance Segmentation"},
                        "dataset": {"type": "coco-instances", "name": dataset},
                        "metrics": scores,
                    }
                ],
            }
        ]
    return head


def _classes(names: Sequence[str]) -> str:
    shown = ", ".join(_text(name) for name in names[:_MOST_CLASSES])
    more = len(names) - _MOST_CLASSES
    return f"{shown} and {more} more, see classes.json" if more > 0 else shown


def _text(value: str) -> str:
    """Returns what others wrote, without what Markdown obeys."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", printable(value))


def _use(repo: str) -> str:
    return f"""## Use

```python
from solov2_jax import Predictor

found = Predictor.from_pretrained("{repo}")("photo.jpg")
print(found.names, found.scores, found.boxes, found.masks.shape)
```

    solov2 predict --workdir hf:{repo} --input photos --output out
    solov2 evaluate --workdir hf:{repo} --data FOLDER --output out
    solov2 train --data FOLDER --workdir runs/mine --config.init_from=hf:{repo}"""


def _measured(about: Mapping[str, Any]) -> str:
    metrics = about["metrics"]
    if not metrics:
        return (
            "## Measured\n\nNothing: no evaluation of this checkpoint is recorded with the run. "
            "`solov2 evaluate` measures it."
        )
    by_class = {k: v for k, v in metrics.items() if k.startswith("segm/AP/")}
    shown = {k: v for k, v in metrics.items() if k in _SHOWN}
    shown |= {k: by_class[k] for k in list(by_class)[:_MOST_CLASSES]}
    rows = [f"| {_text(key)} | {value:.3f} |" for key, value in shown.items()]
    return "\n".join(
        [
            "## Measured",
            "",
            f"COCO's metrics on the run's validation data, at step {about['step']} "
            f"(checkpoint {about['checkpoint']}); the moving average of the weights, where the "
            "run has one.",
            "",
            "| metric | value |",
            "|---|---:|",
            *rows,
        ]
    )


def _data(about: Mapping[str, Any]) -> str:
    data, words = about["data"], {"train": "training", "val": "validation"}
    parts = [
        f"{words[part]}: {data[part]['images']} images with {data[part]['objects']} objects"
        for part in ("train", "val")
        if part in data
    ]
    name = _text(data["name"]) or "Not named by its owner"
    return f"## Data\n\n{name}; " + ("; ".join(parts) or "its size is not recorded") + "."


def _backbone(values: Mapping[str, Any]) -> str:
    if values.get("name", "resnet") == "resnet":
        return f"ResNet-{values['depth']}, {values['norm']}"
    options = ", ".join(f"{key} = {value}" for key, value in values["options"].items())
    return _text(values["name"]) + (f" with {_text(options)}" if options else "")


def _settings(config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    model, input_, train, optim = (config[n] for n in ("model", "input", "train", "optim"))
    rows = {
        "backbone": _backbone(model["backbone"]),
        "heads": f"{model['ins_head']['num_convs']} convolutions of "
        f"{model['ins_head']['channels']} channels; grids "
        f"{', '.join(map(str, model['ins_head']['num_grids']))}",
        "image size at prediction": f"short side {input_['min_size_test']}, long side at most "
        f"{input_['max_size_test']}",
        "steps": f"{about['step']} of {about['steps']}, {train['batch_size']} images each",
        "optimiser": f"{optim['name']}, rate {optim['learning_rate']:g}, {optim['schedule']}, "
        f"moving average {optim['ema_decay']:g}",
        "program": f"solov2_jax {about['solov2_jax']}, JAX {about['jax']}",
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(
        ["## Settings", "", "All of them are in config.json.", "", "| | |", "|---|---|", *lines]
    )


def _licence(about: Mapping[str, Any], licence: str) -> str:
    origin = about["origin"]
    own = f"These weights: {licence}." if licence else "Nothing is said about these weights."
    if not origin:
        return f"## Licence\n\n{own} Training started from random weights."
    revision = f", revision `{origin['revision']}`" if origin["revision"] else ""
    address = f" ({origin['address']}{revision})" if origin["address"] else ""
    sha256 = f", sha256 `{origin['sha256']}`" if origin["sha256"] else ""
    terms = _text(origin["licence"]) or "not known"
    return (
        f"## Licence\n\n{own} Training started from {_text(origin['name'])}{address}{sha256}; "
        f"licence of those: {terms}."
    )
