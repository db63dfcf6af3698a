"""mmdetection from a folder of photographs to COCO results; run in its environment.

python benchmarks/torch_folder.py --case FOLDER --images FOLDER
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch_peer import Case, build_mmdet


def predict_folder(case: Case, images: Path) -> None:
    """Predicts a folder's photographs as mmdetection's test pipeline does, to COCO results."""
    model = build_mmdet(case)  # before the imports: it stands in for mmcv's operators
    import mmcv
    from mmdet.structures import DetDataSample
    from pycocotools.mask import encode

    entries = []
    size = case.config["input"]["max_size_test"], case.config["input"]["min_size_test"]
    for number, path in enumerate(sorted(images.iterdir())):
        picture = mmcv.imread(path)
        resized, factor = mmcv.imrescale(picture, size, return_scale=True)
        shapes = {"img_shape": resized.shape[:2], "ori_shape": picture.shape[:2]}
        sample = DetDataSample(metainfo={**shapes, "scale_factor": (factor, factor)})
        inputs = [torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))]
        data = {"inputs": inputs, "data_samples": [sample]}
        data = model.data_preprocessor(data, training=False)
        with torch.inference_mode():
            (result,) = model.predict(case.in_layout(data["inputs"]), data["data_samples"])
        found = result.pred_instances
        masks = np.asfortranarray(found.masks.cpu().numpy().transpose(1, 2, 0).astype(np.uint8))
        rles = [{**rle, "counts": rle["counts"].decode()} for rle in encode(masks)]
        columns = zip(found.labels.tolist(), found.scores.tolist(), rles, strict=True)
        keys = ("category_id", "score", "segmentation")
        entries += [{"image_id": number, **dict(zip(keys, c, strict=True))} for c in columns]
    (case.folder / "predictions.json").write_text(json.dumps(entries))
    print(f"{number + 1} photographs, {len(entries)} objects")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--form", default="channels_last")
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    arguments = parser.parse_args()
    predict_folder(Case(arguments.case, arguments.form), arguments.images)
