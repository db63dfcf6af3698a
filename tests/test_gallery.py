"""Pictures for a notebook: sheets, and predictions of several images."""

import numpy as np
import pytest
from PIL import Image

from solov2_jax.inference.draw import enlarge
from solov2_jax.inference.prediction import Prediction
from solov2_jax.tools.predict.gallery import gallery, sheet

GREY = (np.arange(60 * 40 * 3, dtype=np.int64) % 251).astype(np.uint8)


def prediction(height, width):
    mask = np.zeros((1, height, width), bool)
    mask[:, 4:20, 4:20] = True
    box = np.array([[4, 4, 20, 20]], np.float32)
    scores, labels = np.array([0.8], np.float32), np.zeros(1, int)
    return Prediction(mask, box, scores, labels, 0, ("cat",))


def test_a_sheet_has_rows_of_pictures_of_one_width(tmp_path):
    wide, tall = GREY.reshape(40, 60, 3), GREY.reshape(60, 40, 3)
    Image.fromarray(tall).save(tmp_path / "tall.png")
    made = sheet([wide, str(tmp_path / "tall.png"), wide], columns=2, width=60)
    assert made.size == (60 + 8 + 60, 90 + 8 + 40)
    pixels = np.asarray(made)
    assert (pixels[:40, :60] == wide).all() and (pixels[98:, :60] == wide).all()
    assert (pixels[:, 60:68] == 255).all(), "white between"
    assert (pixels[45:90, :60] == 255).all(), "and below a low one"
    with_titles = sheet([wide], ["a title"], width=60)
    assert with_titles.width == 60 and with_titles.height > 40
    with pytest.raises(ValueError, match="no pictures"):
        sheet([])


def test_small_pictures_are_enlarged_with_their_masks():
    image = GREY.reshape(60, 40, 3)
    large, found = enlarge(image, prediction(60, 40))
    assert large.shape == (240, 160, 3) and found.masks.shape == (1, 240, 160)
    assert found.boxes.tolist() == [[16, 16, 80, 80]]
    assert found.masks.sum() == 16 * 16 * 16
    assert found.class_names == ("cat",), "the rest stays"
    same = prediction(300, 200)
    assert enlarge(np.zeros((300, 200, 3), np.uint8), same)[1] is same


def test_a_gallery_draws_files_and_arrays(tmp_path):
    image = GREY.reshape(60, 40, 3)
    Image.fromarray(image).save(tmp_path / "a.png")
    found = prediction(60, 40)
    none = found.above(0.9)
    made = gallery([image, tmp_path / "a.png"], [found, none], columns=2, width=160)
    pixels = np.asarray(made).astype(int)
    title = made.height - 240
    drawn, plain = pixels[title:, :160], pixels[title:, 168:]
    assert (plain == np.asarray(image.repeat(4, 0).repeat(4, 1))).all()
    assert (drawn[120:] == plain[120:]).all() and (drawn[30:70] != plain[30:70]).any()
    named = gallery([image], [found], width=160, names=["a name"])
    alone = gallery([image], [found], width=160)
    assert named.size == alone.size and named.tobytes() != alone.tobytes()
    with pytest.raises(ValueError, match="shorter"):
        gallery([image, image], [found])
