"""Key points as SOLOv2's kernels make them: loss, decoding, OKS AP, pictures, bad jsons."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_coco
from tiny_network import tiny_config

from solov2_jax import keypoints
from solov2_jax.data.build import mapped_keypoints, with_keypoints
from solov2_jax.data.coco import read_coco
from solov2_jax.data.keypoints import keypoints_of
from solov2_jax.evaluation.evaluators import make_evaluator
from solov2_jax.evaluation.keypoints import default_sigmas
from solov2_jax.heatmaps import draw_exact_gaussians
from solov2_jax.inference.draw import draw_prediction
from solov2_jax.inference.pasting import scale_points
from solov2_jax.inference.prediction import Prediction, to_coco_results
from solov2_jax.io import InputError
from solov2_jax.models import build_model
from solov2_jax.structs import Batch, Targets
from solov2_jax.tools.report.results_file import evaluate_files
from solov2_jax.tools.synthetic.shape_points import object_points
from solov2_jax.weights.convert import match
from solov2_jax.weights.sources import Weights

COCO = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow "
    "right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle "
    "right_ankle"
).split()
H4, W4 = 12, 16


def posed(names=COCO, flags=(2, 1, 0)):
    """Returns a json whose three objects have as many points as `names`, with these flags."""
    values = tiny_coco.content()
    values["categories"][1] |= {"keypoints": list(names), "skeleton": [[1, 2]]}
    rng = np.random.default_rng(0)
    for record, flag in zip(values["annotations"], flags, strict=True):
        record["category_id"] = values["categories"][1]["id"]
        x, y, w, h = record["bbox"]
        points = np.zeros((len(names), 3))
        if flag:
            points[:, 0], points[:, 1] = x + rng.random(len(names)) * w, y + rng.random() * h
            points[:, 2] = flag
        record |= {"keypoints": points.ravel().tolist(), "num_keypoints": int(bool(flag)) * 17}
    return values


def test_exact_gaussians_have_their_mean_at_the_point():
    points = jnp.float32([[20.0, 24.0, 2], [30.6, 17.4, 1], [30, 20, 0]])
    maps = np.asarray(draw_exact_gaussians(points, (48, 64), 4, 1.2))
    assert maps.shape == (3, H4, W4) and not maps[2].any()
    y, x = np.mgrid[:H4, :W4]
    for j in range(2):
        mean = [4 * ((maps[j] * v).sum() / maps[j].sum() + 0.5) for v in (x, y)]
        # What is cut off at 3 sigma is not the same on both sides.
        np.testing.assert_allclose(mean, points[j, :2], atol=0.1)
    y, x = 4 * (np.mgrid[:H4, :W4] + 0.5)
    want = np.exp(-((x - 30.6) ** 2 + (y - 17.4) ** 2) / (2 * (4 * 1.2) ** 2))
    np.testing.assert_allclose(maps[1][maps[1] > 0], want[maps[1] > 0], rtol=1e-5)


def test_decoding_finds_the_place_between_pixels():
    places = np.float32([[20.0, 24.0], [30.6, 17.4], [9.1, 39.0]])
    maps = draw_exact_gaussians(jnp.asarray(np.c_[places, np.ones(3)]), (48, 64), 4, 1.5)
    maps = jnp.clip(maps * 0.9, 1e-6, 1.0)
    logits = jnp.log(maps) - jnp.log1p(-maps) - keypoints.PRIOR
    # Features that are the maps: kernel j picks the j-th.
    kernels = jnp.concatenate([jnp.eye(3), jnp.zeros((3, 1))], axis=1)[None]
    found = keypoints.decode_keypoints(kernels, jnp.moveaxis(logits, 0, -1))
    np.testing.assert_allclose(found[0, :, :2], places, atol=0.02)
    assert (found[0, :, 2] > 0.7).all()
    inside = jnp.zeros((H4, W4), bool).at[:5].set(True)
    found = keypoints.decode_keypoints(kernels, jnp.moveaxis(logits, 0, -1), inside)
    assert (found[0, :, 1] <= 20).all() and np.isfinite(found).all()


def make_rows(rng, b=2, pairs=3, points=4):
    places = rng.random((b, pairs, points, 3)) * [64, 48, 3]
    places[..., 2] = np.floor(places[..., 2])
    places[0, 2, :, 2] = 0
    return {"cell": jnp.asarray([[0, 3, 1], [2, 2, 4]]), "points": jnp.float32(places)}


def test_the_loss_is_the_plain_one_and_sums_over_parts():
    rng = np.random.default_rng(3)
    rows = make_rows(rng)
    kernels = jnp.float32(rng.normal(size=(2, 5, 4, 7)) * 0.5)
    feat = jnp.float32(rng.normal(size=(2, H4, W4, 6)))
    count = jnp.sum(rows["points"][..., 2] > 0, dtype=jnp.float32)

    def loss(part, kernels):
        of = {k: v[part] for k, v in rows.items()}
        return keypoints.keypoint_loss(kernels[part], feat[part], of, count, sigma=1.5, gamma=2.0)

    total = 0.0
    for b, r, j in np.ndindex(2, 3, 4):
        x, y, flag = np.float64(rows["points"][b, r, j])
        if flag > 0:
            kernel = np.float64(kernels[b, rows["cell"][b, r], j])
            logits = np.float64(feat[b]) @ kernel[:-1] + kernel[-1] - np.log(99)
            p, (v, u) = 1 / (1 + np.exp(-logits)), np.mgrid[:H4, :W4] + 0.5
            dx, dy = u - x / 4, v - y / 4
            t = np.exp(-(dx**2 + dy**2) / (2 * 1.5**2)) * (abs(dx) <= 5) * (abs(dy) <= 5)
            total += ((t - p) ** 2 * -(t * np.log(p) + (1 - t) * np.log(1 - p))).sum()
    want = total / (float(count) * 2 * np.pi * 1.5**2)
    value, grad = jax.value_and_grad(lambda k: loss(slice(None), k))(kernels)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0
    parts = loss(slice(0, 1), kernels) + loss(slice(1, 2), kernels)
    np.testing.assert_allclose(parts, value, rtol=1e-5)


def test_pairs_without_points_are_not_compared():
    points = np.zeros((1, 3, 2, 3), np.float32)
    points[0, 1, 0], points[0, 2, 1] = [5, 6, 2], [7, 8, 1]
    shape = {"boxes": (1, 3, 4), "centers": (1, 3, 2), "masks": (1, 3, 4, 4)}
    fields = {k: jnp.zeros(s) for k, s in shape.items()}
    batch = Batch(
        image=jnp.zeros((1, 16, 16, 3)),
        image_size=jnp.full((1, 2), 16),
        labels=jnp.zeros((1, 3), jnp.int32),
        valid=jnp.ones((1, 3), bool),
        image_id=jnp.zeros(1, jnp.int32),
        keypoints=jnp.asarray(points),
        **{**fields, "masks": fields["masks"].astype(jnp.uint8)},
    )
    targets = Targets(
        cate=jnp.zeros((1, 9), jnp.int32),
        pair_cell=jnp.asarray([[4, 5, 6, 7]]),
        pair_instance=jnp.asarray([[0, 1, 2, 1]]),
        pair_weight=jnp.float32([[1, 1, 1, 0]]),
        num_pairs=jnp.asarray([3]),
        num_cells=jnp.asarray([3]),
    )
    rows, count = keypoints.keypoint_pairs(batch, targets, limit=3)
    assert float(count) == 2  # of the pairs with cells 5 and 6
    used = np.asarray(rows["points"])[0, :, :, 2].any(axis=1)
    assert sorted(np.asarray(rows["cell"])[0, used].tolist()) == [5, 6]


def test_the_heads_exist_where_the_config_names_points():
    config = tiny_config()
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    config.model.keypoint_head.names = ("a", "b", "c")
    model = build_model(config, 2)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    heads = variables["params"]["ins_head"]["keypoint_pred"], variables["params"]["keypoint_head"]
    assert heads[0]["kernel"].shape == (3, 3, 32, 3 * (32 + 4 + 1))
    assert heads[1]["features"]["conv_pred"]["kernel"].shape == (1, 1, 32, 32)
    config.model.keypoint_head.names = ()
    plain = jax.eval_shape(build_model(config, 2).init, jax.random.key(0), image)
    leaves = {
        "/".join(k.key for k in path): np.zeros(leaf.shape, np.float32)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    weights = Weights(path="w", sha256="", source="ours", settings={}, flat=leaves, dropped=())
    kept, report = match(weights, plain)  # weights with the heads fill a network without
    assert not report.new and not any("keypoint" in leaf for leaf in kept)


def write(tmp_path, values):
    return tiny_coco.write(tmp_path, values)


def test_a_run_notes_the_points_of_its_json(tmp_path):
    config = tiny_config()
    data = read_coco(*write(tmp_path, posed()))
    assert mapped_keypoints(config, data) is None and with_keypoints(config, data) is config
    config.data.mapper = "fcpose"
    noted = with_keypoints(config, data).model.keypoint_head
    assert tuple(noted.names) == tuple(COCO) and noted.skeleton == ((1, 2),)
    config.model.keypoint_head.names = ("tip", "tail")
    with pytest.raises(InputError, match=r"names are tip, tail, but .* has nose, left_eye"):
        with_keypoints(config, data)


def test_pairs_of_ones_own_change_places(tmp_path):
    images, path = write(tmp_path, posed(["tip", "wing_a", "wing_b"]))
    data = read_coco(images, path)
    assert keypoints_of(data)[0].mirrored.tolist() == [0, 1, 2]
    points, skeleton = keypoints_of(data, (("wing_a", "wing_b"),))
    assert points.mirrored.tolist() == [0, 2, 1] and skeleton == ((1, 2),)
    with pytest.raises(InputError, match="no key point 'wing_c'"):
        keypoints_of(data, (("wing_a", "wing_c"),))
    with pytest.raises(InputError, match="in two pairs"):
        keypoints_of(data, (("wing_a", "tip"), ("wing_a", "wing_b")))


def spoiled(key, value):
    values = posed()
    if key in ("keypoints", "skeleton"):
        values["categories"][1][key] = value
    else:
        values["annotations"][0]["keypoints"] = value
    return values


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("keypoints", None, "categories name none"),
        ("keypoints", ["a", "a"], "a list of different names"),
        ("keypoints", "nose", "a list of different names"),
        ("skeleton", [[1, 18]], "`skeleton` of category"),
        ("skeleton", [1], "`skeleton` of category"),
        ("points", [1, 2, 2], "`keypoints` must be"),
        ("points", [1, 2, 3] * 17, "`keypoints` must be"),
        ("points", "x", "`keypoints` must be"),
    ],
)
def test_a_wrong_json_is_one_error_with_file_and_field(tmp_path, key, value, message):
    images, path = write(tmp_path, spoiled(key, value))
    data = read_coco(images, path)
    with pytest.raises(InputError) as error:
        keypoints_of(data)
    assert message in str(error.value) and str(path) in str(error.value)


def results_of(values, noise=0.0):
    """Returns the objects themselves as results, their points moved."""
    rng, results = np.random.default_rng(1), []
    for i, record in enumerate(values["annotations"]):
        points = np.array(record["keypoints"], float).reshape(-1, 3)
        points[:, :2] += rng.normal(0, noise or 1e-9, (len(points), 2))
        results.append(
            {
                "image_id": record["image_id"],
                "category_id": record["category_id"],
                "bbox": record["bbox"],
                "score": 0.9 - 0.1 * i,
                "segmentation": record["segmentation"],
                "keypoints": points.ravel().tolist(),
            }
        )
    return results


def evaluator_of(path, **options):
    categories = {c["id"]: c["name"] for c in json.loads(path.read_text())["categories"]}
    return make_evaluator(
        str(path), list(categories), list(categories.values()), metric="keypoints", **options
    )


def stats_by_pycocotools(path, results, sigmas):
    from pycocotools.coco import COCO as Coco
    from pycocotools.cocoeval import COCOeval

    truth = Coco(str(path))
    scores = COCOeval(truth, truth.loadRes([dict(r) for r in results]), "keypoints")
    scores.params.kpt_oks_sigmas = np.array(sigmas)
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    return scores.stats


@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("crowd", [0, 1])
def test_oks_ap_is_pycocotools(tmp_path, noise, crowd):
    values = posed()
    values["annotations"][1]["iscrowd"] = crowd
    for i, record in enumerate(values["annotations"]):
        record |= {"id": i + 1, "area": record["bbox"][2] * record["bbox"][3]}
        record["num_keypoints"] = sum(f > 0 for f in record["keypoints"][2::3])
    path = tmp_path / "own.json"
    path.write_text(json.dumps(values))
    results = [r for r in results_of(values, noise) if isinstance(r["segmentation"], list | dict)]
    evaluator = evaluator_of(path)
    evaluator._seen.update(i["id"] for i in values["images"])
    evaluator.results = results
    got = [v if np.isfinite(v) else -1 for v in evaluator._stats()]
    want = stats_by_pycocotools(path, results, default_sigmas(17))
    np.testing.assert_allclose(got, want, atol=1e-12)
    if noise == 0.0:
        assert got[0] == pytest.approx(1.0)


def test_sigmas_are_one_for_each_point(tmp_path):
    assert default_sigmas(5) == (0.2,) * 5
    assert default_sigmas(17)[0] == pytest.approx(0.026)
    path = tmp_path / "own.json"
    path.write_text(json.dumps(posed()))
    with pytest.raises(InputError, match=r"has 2 entries, but .* has 17 key points"):
        evaluator_of(path, keypoint_sigmas=(0.1, 0.1))
    evaluator = evaluator_of(path)
    bare = {k: v for k, v in results_of(posed())[0].items() if k != "keypoints"}
    evaluator._seen.update([bare["image_id"]])
    evaluator.results = [bare]
    with pytest.raises(InputError, match="has no list `keypoints` of 51 numbers"):
        evaluator._stats()


def test_predictions_keep_draw_and_write_their_points():
    masks = np.zeros((2, 60, 80), bool)
    masks[0, 10:30, 10:30] = masks[1, 30:50, 40:70] = True
    points = np.float32([[[20, 20, 0.9], [28, 28, 0.8]], [[50, 40, 0.9], [60, 45, 0.0]]])
    prediction = Prediction(
        masks=masks,
        boxes=np.float32([[10, 10, 30, 30], [40, 30, 70, 50]]),
        scores=np.float32([0.9, 0.4]),
        labels=np.array([0, 0]),
        image_id=3,
        class_names=("a",),
        keypoints=points,
        skeleton=((1, 2),),
    )
    np.testing.assert_array_equal(prediction.above(0.5).keypoints, points[:1])
    (first, _) = to_coco_results(prediction, [7])
    np.testing.assert_allclose(first["keypoints"], [19.5, 19.5, 0.9, 27.5, 27.5, 0.8], atol=1e-4)
    image = np.zeros((60, 80, 3), np.uint8)
    drawn = draw_prediction(image, prediction, ("a",), labels=False)
    without = dataclasses.replace(prediction, keypoints=None)
    plain = draw_prediction(image, without, ("a",), labels=False)
    changed = (drawn != plain).any(axis=-1)
    assert changed[20, 20] and changed[24, 24] and changed[40, 50]
    assert not changed[45, 60]  # its score is too low
    moved = scale_points(points, np.array([30, 40]), np.array([60, 80]))
    np.testing.assert_allclose(moved[0, 0], [40, 40, 0.9])


def test_points_of_generated_shapes():
    outline = np.array([[10.0, 2], [20, 12], [10, 22], [0, 12]])
    full = np.zeros((40, 40), bool)
    full[2:23, 0:21] = True
    seen = full.copy()
    seen[:, 15:] = False
    values = object_points(outline, full, seen)
    points = np.reshape(values["keypoints"], (5, 3))
    assert points[:, :2].tolist() == [
        [9.5, 11.5],
        [9.5, 1.5],
        [19.5, 11.5],
        [9.5, 21.5],
        [-0.5, 11.5],
    ]
    assert points[:, 2].tolist() == [2, 2, 1, 2, 2] and values["num_keypoints"] == 5
    angle = np.linspace(0, 6, 40)
    circle = 10 + 5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert object_points(circle, full, full)["num_keypoints"] == 1


@pytest.mark.parametrize("masks", [True, False])
def test_any_programs_results_are_scored(tmp_path, masks):
    values = posed()
    path, predictions = tmp_path / "own.json", tmp_path / "predictions.json"
    path.write_text(json.dumps(values))
    results = results_of(values)
    if not masks:
        bare = ("segmentation", "bbox")
        results = [{k: v for k, v in r.items() if k not in bare} for r in results]
    predictions.write_text(json.dumps(results))
    metrics = evaluate_files(str(path), str(predictions), metric="keypoints")
    assert np.isnan(metrics["segm/AP"]) != masks
    assert 0 < metrics["keypoints/AP"] <= 1
    results[0]["keypoints"] = ["x"] * 51
    predictions.write_text(json.dumps(results))
    with pytest.raises(InputError, match=r"entry 0 .*`keypoints`"):
        evaluate_files(str(path), str(predictions), metric="keypoints")
