"""Pictures of an evaluation: truth as annotated, nothing left of an earlier one."""

import numpy as np
import tiny_coco
from PIL import Image

from solov2_jax.data.coco import load_coco
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.evaluate import FinishedEvaluation
from solov2_jax.inference.prediction import Prediction
from solov2_jax.tools.report.pictures import annotated_objects, write_pictures


def test_truth_is_the_annotated_masks(tmp_path):
    dataset = load_coco(*tiny_coco.write(tmp_path))
    index = list(dataset.image_ids).index(7)
    objects = annotated_objects(dataset, index)
    assert objects.masks.shape == (2, 48, 64)
    names = [dataset.class_names[label] for label in objects.labels]
    areas = dict(zip(names, np.asarray(objects.masks).sum((1, 2)), strict=True))
    assert areas == {"cat": 20 * 20, "dog": 12 * 12}
    by_name = dict(zip(names, objects.boxes.tolist(), strict=True))
    assert by_name["dog"] == [30, 20, 42, 32]


def test_pictures_of_images_with_and_without_objects(tmp_path):
    dataset = load_coco(*tiny_coco.write(tmp_path))
    out = tmp_path / "pictures"
    out.mkdir()
    (out / "stale.jpg").write_bytes(b"")
    predictions = {}
    for image_id, size in ((7, (48, 64)), (9, (40, 40))):
        none = np.zeros((0, *size), bool)
        floats = np.zeros(0, np.float32)
        empty = Prediction(none, np.zeros((0, 4), np.float32), floats, floats, image_id)
        predictions[image_id] = empty
    evaluation = FinishedEvaluation(
        folder=tmp_path,
        dataset=dataset,
        evaluator=CocoEvaluator(dataset.annotation_file, (), ()),
        metrics={},
        predictions=predictions,
        milliseconds={},
    )
    write_pictures(evaluation)
    assert sorted(p.name for p in out.iterdir()) == ["7.jpg", "9.jpg"]
    picture = np.asarray(Image.open(out / "7.jpg"))
    factor = 256 // 48
    assert picture.shape == (48 * factor, 2 * 64 * factor + 8, 3)
    left, right = picture[:, : 64 * factor], picture[:, -64 * factor :]
    assert np.abs(left.astype(int) - right).mean() > 5  # only the truth is drawn
