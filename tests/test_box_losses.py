"""Masks from boxes: BoxInst's terms by hand, and which objects of a data set have a box only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_coco import annotation, content, load, square

from solov2_jax import box_losses, losses, platforms
from solov2_jax.data.augment import Augment
from solov2_jax.data.buckets import Resize
from solov2_jax.data.coco import with_share_of_masks
from solov2_jax.data.pipeline import train_batches
from solov2_jax.pair_losses import pair_loss
from solov2_jax.structs import Outputs, Targets

B, G, H4, W4, E, P = 2, 3, 12, 16, 4, 7


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.74, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((10, 20, 5), (5.20, -5.92, 5.63)),
    ],
)
def test_lab_of_known_colours(rgb, lab):
    np.testing.assert_allclose(box_losses.rgb_to_lab(jnp.float32(rgb)), lab, atol=0.05)


def make_case(seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 255, (B, H4, W4, 3)) // 40 * 40  # a few colours
    image = np.repeat(np.repeat(image, 4, 1), 4, 2).astype(np.uint8)
    masks = np.zeros((B, G, H4, W4), np.uint8)
    for b in range(B):
        for g in range(G):
            y, x = rng.integers(0, 6, 2)
            masks[b, g, y : y + 3 + g, x : x + 5 + b] = 1
    return {
        "kernels": np.float32(rng.normal(size=(B, P, E))),
        "mask_feat": np.float32(rng.normal(size=(B, H4, W4, E))),
        "masks": masks,
        "image": image,
        "image_size": np.int32([[H4 * 4, W4 * 4], [H4 * 4 - 10, W4 * 4 - 7]]),
        "pair_instance": rng.integers(0, G, (B, P)).astype(np.int32),
        "pair_weight": np.float32(rng.random((B, P)) * (rng.random((B, P)) < 0.6)),
    }


def by_hand(case, lab, bgr=False):
    """Pixel by pixel, with all eight neighbours, as the paper has it."""
    logits = np.einsum("bpe,bhwe->bphw", case["kernels"], case["mask_feat"]).astype(np.float64)
    soft = 1 / (1 + np.exp(-logits))
    sums = np.zeros(2)
    for b in range(B):
        inside = np.zeros((H4, W4), bool)
        height, width = case["image_size"][b]
        inside[(4 * np.arange(H4) + 2) < height] = True
        inside &= (4 * np.arange(W4) + 2 < width)[None]
        for n in range(P):
            box, p = case["masks"][b, case["pair_instance"][b, n]], soft[b, n]
            projection = 0
            for axis in (0, 1):
                x, t = p.max(axis), box.max(axis)
                projection += 1 - 2 * (x * t).sum() / ((x * x).sum() + (t * t).sum() + 1e-5)
            total, count = 0.0, 0
            for y, x in np.argwhere(box):
                for dy in (-2, 0, 2):
                    for dx in (-2, 0, 2):
                        v, u = y + dy, x + dx
                        if (dy, dx) == (0, 0) or not (0 <= v < H4 and 0 <= u < W4):
                            continue
                        distance = np.linalg.norm(lab[b, y, x] - lab[b, v, u])
                        if not inside[y, x] or not inside[v, u] or np.exp(-distance / 2) < 0.3:
                            continue
                        same = p[y, x] * p[v, u] + (1 - p[y, x]) * (1 - p[v, u])
                        total, count = total - np.log(same), count + 1
            sums += case["pair_weight"][b, n] * np.array([projection, total / max(count, 1)])
    return sums


def edges_of(case, bgr=False):
    image, size = jnp.asarray(case["image"]), jnp.asarray(case["image_size"])
    return box_losses.color_edges(image, size, bgr=bgr, threshold=0.3)


@pytest.mark.parametrize("logits", [1, 3 * 5 * B * H4 * W4, 2**22])
def test_value_and_gradient_equal_the_plain_form(monkeypatch, logits):
    """Whatever the number of masks that are made at a time."""
    monkeypatch.setattr(platforms, "CPU", platforms.CPU._replace(dice_logits=logits))
    case = make_case()
    lab = np.asarray(box_losses.rgb_to_lab(jnp.float32(case["image"][:, ::4, ::4])))
    edges, factors = edges_of(case), jnp.float32([0.7, 1.3])
    rest = [jnp.asarray(case[k]) for k in ("masks", "pair_instance", "pair_weight")]
    kernels, feat = jnp.asarray(case["kernels"]), jnp.asarray(case["mask_feat"])

    def chunked(kernels, feat):
        masks, instance, weight = rest
        loss, sums = pair_loss(
            box_losses.mask_terms, kernels, feat, instance, (masks, edges), weight, factors
        )
        return 2 * loss, sums

    def plain(kernels, feat):
        masks, instance, weight = rest
        logits = jnp.einsum("bpe,bhwe->bphw", kernels, feat)
        terms = box_losses.mask_terms(logits, instance, (masks, edges))
        return 2 * sum(f * jnp.sum(weight * t) for f, t in zip(factors, terms, strict=True))

    value = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))
    (loss, sums), grads = value(kernels, feat)
    want = by_hand(case, lab)
    np.testing.assert_allclose(sums, want, rtol=1e-4)
    np.testing.assert_allclose(loss, 2 * (factors * want).sum(), rtol=1e-4)
    for got, plainly in zip(grads, jax.grad(plain, (0, 1))(kernels, feat), strict=True):
        np.testing.assert_allclose(got, plainly, rtol=1e-4, atol=1e-5)


def test_colours_are_read_in_their_order_and_beyond_the_image_is_nobody():
    case = make_case(1)
    turned = {**case, "image": case["image"][..., ::-1].copy()}
    edges = np.asarray(edges_of(case))
    np.testing.assert_array_equal(edges, edges_of(turned, bgr=True))
    assert edges.any() and not edges.all()
    assert not edges[1, :, 10:].any() and not edges[1, 2:, 8:].any()
    grey = {**case, "image": case["image"][..., :1]}
    one = np.asarray(edges_of(grey))
    same = {**case, "image": np.repeat(case["image"][..., :1], 3, -1)}
    assert (one == np.asarray(edges_of(same))).mean() > 0.99  # a* and b* of grey are about 0


def test_the_object_is_found_in_its_box():
    """A disc of one colour: what the box allows and the colour joins, and nothing else."""
    y, x = np.mgrid[:H4, :W4]
    disc = np.hypot(y - 5.5, x - 7.5) < 4
    image = np.where(disc[..., None], [200, 60, 60], [60, 120, 60])
    image = np.repeat(np.repeat(image, 4, 0), 4, 1)[None].astype(np.uint8)
    box = np.zeros((1, 1, H4, W4), np.uint8)
    rows, columns = np.flatnonzero(disc.any(1)), np.flatnonzero(disc.any(0))
    box[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 1
    size = jnp.int32([[H4 * 4, W4 * 4]])
    edges = box_losses.color_edges(jnp.asarray(image), size, bgr=False, threshold=0.3)
    nought, of_images = jnp.zeros((1, 1), jnp.int32), (jnp.asarray(box), edges)

    @jax.jit
    def descend(logits):
        def loss(logits):
            projection, pairwise = box_losses.mask_terms(logits, nought, of_images)
            return (projection + pairwise).sum()

        return jax.lax.fori_loop(0, 400, lambda _, z: z - 5.0 * jax.grad(loss)(z), logits)

    start = 0.1 * np.random.default_rng(0).normal(size=box.shape) + 0.5 * box - 0.25
    mask = np.asarray(descend(jnp.float32(start)))[0, 0] > 0
    iou = (mask & disc).sum() / (mask | disc).sum()
    filled = disc.sum() / box.sum()
    assert iou > 0.9 > filled + 0.05


def test_an_object_without_a_mask_teaches_its_class_only():
    rng = np.random.default_rng(3)
    outputs = Outputs(
        cate=jnp.float32(rng.normal(size=(1, 5, 2))),
        kernel=jnp.float32(rng.normal(size=(1, 5, E))),
        mask_feat=jnp.float32(rng.normal(size=(1, H4, W4, E))),
    )
    targets = Targets(
        cate=jnp.int32([[0, 1, 2, 2, 2]]),
        pair_cell=jnp.int32([[0, 1]]),
        pair_instance=jnp.int32([[0, 1]]),
        pair_weight=jnp.float32([[1, 1]]),
        num_pairs=jnp.int32([2]),
        num_cells=jnp.int32([2]),
    )
    masks = jnp.asarray(rng.integers(0, 2, (1, 2, H4, W4)), jnp.uint8)
    weights = {"focal_alpha": 0.25, "focal_gamma": 2.0, "focal_weight": 1.0, "dice_weight": 3.0}
    both = losses.solov2_loss(
        outputs, targets, masks, has_mask=jnp.array([[True, False]]), **weights
    )[1]
    first = dataclasses.replace(targets, pair_weight=jnp.float32([[1, 0]]))
    alone = losses.solov2_loss(outputs, first, masks, **weights)[1]
    for name in ("loss_ins", "loss_cate", "mean_iou"):
        assert float(both[name]) == pytest.approx(float(alone[name]), rel=1e-6)
    assert both["num_pairs"] == 2 and both["pairs_dropped"] == 0


# --- Which objects have a box only


def mixed_content():
    values = content()
    values["annotations"] += [
        annotation(4, 9, 5, segmentation=None, bbox=[4, 6, 20, 12]),
        annotation(5, 7, 20, segmentation=[], bbox=[2, 2, 8, 30]),
        annotation(6, 7, 5, segmentation=None, bbox=None),
        annotation(7, 7, 5, segmentation=None, iscrowd=1),
        annotation(8, 7, 5, segmentation=None, bbox=[80, 2, 8, 30]),
        annotation(9, 9, 5, segmentation=[[1, 2, 3, 4]], bbox=[4, 6, 9, 9]),
    ]
    return values


def test_boxes_without_masks_are_kept_where_they_are_wanted(tmp_path):
    data = load(tmp_path, mixed_content(), boxes=True)
    assert data.annotation_ids.tolist() == [2, 3, 5, 1, 4, 9]
    assert data.has_mask.tolist() == [True, True, False, True, False, False]
    outline = data.segmentations.polygons(4)
    assert [p.tolist() for p in outline] == [[4, 6, 24, 6, 24, 18, 4, 18]]
    np.testing.assert_array_equal(data.segmentations.polygons(1)[0], square(30, 20, 12)[0])
    assert data.counts["boxes_only"] == 3
    assert data.counts["no_segmentation"] + data.counts["no_valid_polygon"] == 3
    assert "3 objects have a box and no segmentation" in data.summary()
    plain = load(tmp_path, mixed_content())
    assert plain.annotation_ids.tolist() == [2, 3, 1] and plain.has_mask.all()
    assert plain.counts["no_segmentation"] + plain.counts["no_valid_polygon"] == 6


def test_a_share_of_the_masks_is_used_and_of_the_others_the_boxes(tmp_path):
    data = load(tmp_path, mixed_content(), boxes=True)
    for share, number in ((1.0, 3), (0.4, 1), (0.0, 0)):
        part = with_share_of_masks(data, share, seed=1)
        assert part.has_mask.sum() == number and not (part.has_mask & ~data.has_mask).any()
        np.testing.assert_array_equal(part.boxes, data.boxes)
        for i, (x0, y0, x1, y1) in enumerate(data.boxes.tolist()):
            mine = [p.tolist() for p in part.segmentations.polygons(i)]
            whole = [p.tolist() for p in data.segmentations.polygons(i)]
            assert mine == (whole if part.has_mask[i] else [[x0, y0, x1, y0, x1, y1, x0, y1]])
    drawn = [with_share_of_masks(data, 0.4, seed).has_mask.tolist() for seed in range(9)]
    assert drawn[1] == with_share_of_masks(data, 0.4, 1).has_mask.tolist()
    assert len(set(map(tuple, drawn))) > 1


def test_a_box_far_beyond_its_image_is_outlined_within_it(tmp_path):
    """A polygon is walked pixel by pixel: one of a wild box would never end."""
    values = mixed_content()
    values["annotations"][3]["bbox"] = [-1e250, 6, 2e250, 1e12]
    values["annotations"][0]["bbox"] = [-1e250, -3, 2e250, 1e250]
    data = load(tmp_path, values, boxes=True)
    part = with_share_of_masks(data, 0.0, seed=0)
    for dataset in (data, part):
        image = np.repeat(np.arange(len(dataset)), dataset.objects_per_image)
        for i in np.flatnonzero(~dataset.has_mask).tolist():
            (outline,) = dataset.segmentations.polygons(i)
            size = [dataset.widths[image[i]], dataset.heights[image[i]]]
            assert (outline >= 0).all() and (outline.reshape(4, 2) <= size).all()
    assert np.abs(data.boxes).max() > 1e200  # as annotated


AUGMENTS = {
    "none": Augment(),
    "moved": Augment(turn_prob=1.0, jitter_scale=(0.8, 1.2), jitter_size=(64, 64)),
    "joined": Augment(paste_prob=1.0, mosaic_prob=1.0, mixup_prob=1.0),
}


@pytest.mark.parametrize("kind", AUGMENTS)
def test_a_batch_tells_which_masks_are_boxes(tmp_path, kind):
    data = load(tmp_path, mixed_content(), boxes=True)
    batches = train_batches(
        data,
        seed=1,
        num_steps=4,
        batch_size=3,
        resize=Resize((48,), 64),
        flip_prob=0.5,
        augment=AUGMENTS[kind],
    )
    number = 0
    for batch in batches:
        assert batch["has_mask"].shape == batch["valid"].shape
        assert not batch["has_mask"][~batch["valid"]].any()
        for row, slot in np.argwhere(batch["valid"] & ~batch["has_mask"]):
            number += 1
            mask, (x0, y0, x1, y1) = batch["masks"][row, slot], batch["boxes"][row, slot] / 4
            if kind != "joined":  # where nothing covers it, the mask fills the box
                assert mask.sum() == pytest.approx((x1 - x0) * (y1 - y0), abs=mask.shape[0] * 2)
    assert number > 4
    plain = train_batches(
        load(tmp_path), seed=1, num_steps=1, batch_size=3, resize=Resize((48,), 64), flip_prob=0.5
    )
    assert "has_mask" not in next(iter(plain))
