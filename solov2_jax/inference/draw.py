"""The visualizer: objects drawn into pictures, translucent masks, contours, class names and scores.

`draw_objects` is the one function that draws masks, of predictions, annotations and
training batches alike. Every object has a colour of its own, or its class's or its
track's. Labels are small text boxes whose places are tried all at once: the cheapest
free one wins, near the object's middle, with little of it and of the others hidden, so
that forty objects of one class stay apart. PIL and numpy only.
"""

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from solov2_jax.inference.prediction import Prediction, Window

# Objects are looked at on a grid of at most so many pixels a side.
GRID = 400
# Places tried inside an object.
INSIDE = 64
# Costs: share of the label that covers other objects, share of its own object that it
# covers, distance from the object's middle in units of its size.
OTHERS, OWN, DISTANCE = 2.0, 1.0, 0.6
# A label without the class name must be cheaper by this to be preferred.
SHORT = 0.45
# Share of the picture under full labels from which on it counts as crowded.
CROWDED = 0.12

# Least score of a key point that is drawn.
POINT_SCORE = 0.2

Measure = Callable[[str, int], tuple[int, int]]


@dataclass(frozen=True)
class Label:
    """The text of object `index` and its rectangle (x0, y0, x1, y1) in the picture."""

    index: int
    text: str
    font_size: int
    box: tuple[int, int, int, int]


def place_labels(
    prediction: Prediction,
    class_names: Sequence[str],
    measure: Measure,
    font_sizes: tuple[int, int],
) -> list[Label]:
    """Returns the labels that find a place.

    Small objects choose first, because they have the fewest places. An object without
    room for "name score" gets its score alone, and without room for that nothing. In a
    crowded picture only wide objects and the best of each class show their name. An
    object of a track shows "#3 name score", and "#3" where there is little room.

    Args:
      measure: (text, font size) -> (width, height) of its box in pixels.
      font_sizes: smallest and largest; in between by the object's size.
    """
    places = Places(prediction)
    sizes = np.clip((np.sqrt(places.areas) / 6).round().astype(int), *font_sizes)
    full, short = label_texts(prediction, class_names)
    spaces = [measure(t, int(size)) for t, size in zip(full, sizes, strict=True)]
    needed = sum(width * height for width, height in spaces)
    crowded = needed > CROWDED * places.height * places.width
    best_of_class = set(np.unique(prediction.labels, return_index=True)[1].tolist())
    labels = []
    for i in np.argsort(places.areas, kind="stable").tolist():
        wide = spaces[i][0] <= prediction.boxes[i, 2] - prediction.boxes[i, 0]
        named = not crowded or wide or i in best_of_class
        texts = [full[i], short[i]] if named else [short[i]]
        options = [places.cheapest(i, *measure(t, int(sizes[i]))) for t in texts]
        costs = [options[0][0], *(cost + SHORT for cost, _ in options[1:])]
        chosen = int(np.argmin(costs))
        box = options[chosen][1]
        if box is not None:
            places.occupy(box)
            labels.append(Label(i, texts[chosen], int(sizes[i]), box))
    return labels


def label_texts(prediction: Prediction, class_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the full and the short text of each object."""
    scores = [f"{score:.2f}" for score in prediction.scores]
    names = [class_names[int(label)] for label in prediction.labels]
    full = [f"{name} {score}" for name, score in zip(names, scores, strict=True)]
    if prediction.tracks is None:
        return full, scores
    short = [f"#{number}" for number in prediction.tracks.tolist()]
    return [f"{a} {b}" for a, b in zip(short, full, strict=True)], short


class Places:
    """Knows which pixels objects and earlier labels occupy."""

    def __init__(self, prediction: Prediction):
        self.height, self.width = prediction.masks.shape[1:]
        self.stride = max(1, math.ceil(max(self.height, self.width) / GRID))
        self.boxes = prediction.boxes
        # [n, h, w], a view: every stride-th pixel.
        self.masks = prediction.thinned(self.stride)
        self.areas = self.masks.sum((1, 2), dtype=np.int64) * self.stride**2
        self.covered = integral(np.any(self.masks, axis=0))
        self.occupied = np.zeros((0, 4), np.int64)

    def occupy(self, box: tuple[int, int, int, int]) -> None:
        """Marks a label's box as occupied."""
        self.occupied = np.concatenate([self.occupied, [box]])

    def cheapest(
        self, i: int, width: int, height: int
    ) -> tuple[float, tuple[int, int, int, int] | None]:
        """Returns cost and box of object i's best free place, (inf, None) without."""
        if width > self.width or height > self.height:
            return math.inf, None
        middle, centers = self.candidates(i, width, height)
        x0 = np.clip(centers[:, 0] - width / 2, 0, self.width - width).astype(int)
        y0 = np.clip(centers[:, 1] - height / 2, 0, self.height - height).astype(int)
        boxes = np.stack([x0, y0, x0 + width, y0 + height], 1)
        if len(self.occupied):
            a, b = boxes[:, None], self.occupied
            apart = (a[..., :2] > b[:, 2:]) | (a[..., 2:] < b[:, :2])
            boxes = boxes[np.all(np.any(apart, axis=2), axis=1)]
        if not len(boxes):
            return math.inf, None
        own = count(integral(self.masks[i]), boxes, self.stride)
        others = np.maximum(count(self.covered, boxes, self.stride) - own, 0)
        area = max(int(self.areas[i]), 1)
        distance = np.hypot(*((boxes[:, :2] + boxes[:, 2:]) / 2 - middle).T)
        cost = (
            OTHERS * others / (width * height)
            + OWN * own / area
            + DISTANCE * distance / (math.sqrt(area) + height)
        )
        best = int(np.argmin(cost))
        left, top, right, bottom = boxes[best].tolist()
        return float(cost[best]), (left, top, right, bottom)

    def candidates(self, i: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns an object's middle [2] and the centres of places to try [n, 2], x y.

        Inside the object, spread over it, and around its box.
        """
        x0, y0, x1, y1 = self.boxes[i]
        middle = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
        dx, dy = width / 2 + 1, height / 2 + 1
        around = [(middle[0], y0 - dy), (middle[0], y1 + dy)]
        around += [(x0 - dx, middle[1]), (x1 + dx, middle[1])]
        around += [(x, y) for x in (x0 + dx, x1 - dx) for y in (y0 - dy, y1 + dy)]
        ys, xs = np.nonzero(self.masks[i])
        if len(xs) == 0:
            return middle, np.array(around)
        inside = np.stack([xs, ys], 1) * self.stride
        middle = np.median(inside, 0)
        # The middle of a ring is not on the ring: take its nearest pixel.
        middle = inside[np.argmin(np.abs(inside - middle).sum(1))].astype(float)
        spread = inside[:: max(1, len(inside) // INSIDE)]
        return middle, np.concatenate([middle[None], spread, np.array(around)])


def integral(mask: np.ndarray) -> np.ndarray:
    """Returns the summed-area table [h + 1, w + 1] of a mask."""
    return np.pad(mask.cumsum(0, dtype=np.int32).cumsum(1), ((1, 0), (1, 0)))


def count(table: np.ndarray, boxes: np.ndarray, stride: int) -> np.ndarray:
    """Returns about how many pixels of a mask lie in each box, by its table."""
    h, w = table.shape
    x0, x1 = np.minimum(boxes[:, [0, 2]].T // stride, w - 1)
    y0, y1 = np.minimum(boxes[:, [1, 3]].T // stride, h - 1)
    return (table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]) * stride**2


FILL_OPACITY = 0.4
COLOR_BY = ("object", "class", "track")
# Small pictures are enlarged by a whole factor up to about this height.
MIN_HEIGHT = 256
# Brightness of red, green and blue (ITU-R BT.601).
LUMA = np.array([0.299, 0.587, 0.114])
# Font heights in pixels; the largest is a share of the picture's short side.
MIN_FONT, MAX_FONT, FONT_SHARE = 9, 32, 1 / 32


def draw_prediction(
    image: np.ndarray,
    prediction: Prediction,
    class_names: Sequence[str],
    color_by: str = "object",
    labels: bool = True,
) -> np.ndarray:
    """Returns the image with its prediction drawn into it, uint8 [H, W, 3].

    Args:
      image: uint8 [H, W, 3], RGB, at the prediction's size; it is not changed.
      class_names: the names of labels 0..K-1.
      color_by: see `object_colors`.
      labels: write class names, tracks and scores too.
    """
    if image.shape[:2] != prediction.masks.shape[1:]:
        raise ValueError(
            f"the image is {image.shape[:2]} (height, width) and its masks are "
            f"{prediction.masks.shape[1:]}: they belong to different images"
        )
    colors = object_colors(prediction, color_by)
    crops = [prediction.crop(i) for i in range(len(prediction))]
    picture = draw_objects(image, crops, colors)
    if prediction.keypoints is not None:
        picture = draw_keypoints(picture, prediction.keypoints, prediction.skeleton, colors)
    if not labels:
        return picture
    largest = round(min(image.shape[:2]) * FONT_SHARE)
    sizes = (MIN_FONT, min(max(largest, MIN_FONT), MAX_FONT))
    placed = place_labels(prediction, class_names, text_box, sizes)
    return draw_labels(picture, placed, colors)


def enlarge(image: np.ndarray, prediction: Prediction) -> tuple[np.ndarray, Prediction]:
    """Returns a small image and its prediction so large that labels can be read.

    Both as they are, if the image is about `MIN_HEIGHT` pixels high or higher.
    """
    factor = MIN_HEIGHT // image.shape[0]
    if factor < 2:
        return image, prediction
    masks = np.asarray(prediction.masks).repeat(factor, 1).repeat(factor, 2)
    large = replace(prediction, masks=masks, boxes=prediction.boxes * factor)
    if prediction.keypoints is not None:
        large = replace(large, keypoints=prediction.keypoints * [factor, factor, 1])
    return image.repeat(factor, 0).repeat(factor, 1), large


def shrink(image: np.ndarray, longest: int) -> np.ndarray:
    """Returns the picture with its longer side at most so many pixels."""
    factor = longest / max(image.shape[:2])
    if factor >= 1:
        return image
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def object_colors(prediction: Prediction, color_by: str) -> np.ndarray:
    """Returns a colour for each object, uint8 [n, 3].

    Args:
      color_by: "object", so that neighbours in the list differ; "class" or "track", so
        that a class or a followed object keeps its colour in all pictures.
    """
    if color_by not in COLOR_BY:
        raise ValueError(f"color_by is {color_by!r}; use one of {', '.join(COLOR_BY)}")
    if color_by == "object":
        return distinct_colors(len(prediction))
    if color_by == "track" and prediction.tracks is None:
        raise ValueError("colours by track need a prediction with tracks")
    numbers = prediction.labels if color_by == "class" else prediction.tracks
    colors = [distinct_color(int(i)) for i in np.asarray(numbers)]
    return np.array(colors, np.uint8).reshape(-1, 3)


def distinct_colors(n: int) -> np.ndarray:
    """Returns n bright RGB colours, uint8 [n, 3]; neighbours differ most."""
    return np.array([distinct_color(i) for i in range(n)], np.uint8).reshape(-1, 3)


@cache
def distinct_color(i: int) -> tuple[int, int, int]:
    """Returns the i-th bright RGB colour.

    The hue moves on by the golden angle; saturation and value alternate, so that hues
    that come round again still look different.
    """
    golden = (math.sqrt(5) - 1) / 2
    tones = ((0.85, 1.0), (0.55, 1.0), (0.95, 0.8))
    rgb = np.array(colorsys.hsv_to_rgb((0.02 + i * golden) % 1, *tones[i % 3]))
    # Deep blue and violet would be lost on dark pictures: mix in white.
    white = max(0.0, (0.4 - rgb @ LUMA) / (1 - rgb @ LUMA))
    red, green, blue = ((rgb + (1 - rgb) * white) * 255).round().astype(int).tolist()
    return red, green, blue


def draw_objects(
    image: np.ndarray, crops: Sequence[tuple[Window, np.ndarray]], colors: np.ndarray
) -> np.ndarray:
    """Returns the image under translucent masks, large ones below, contours on top.

    Args:
      image: uint8 [H, W, 3]; it is not changed.
      crops: of each object a window (rows, columns) of the image and the mask in it,
        bool, such as `Prediction.crop` returns.
      colors: uint8 [n, 3].
    """
    picture = image.copy()
    thickness = max(1, round(min(image.shape[:2]) / 400))
    largest_first = np.argsort([-np.count_nonzero(mask) for _, mask in crops], kind="stable")
    for i in largest_first.tolist():
        window, mask = crops[i]
        part = picture[window]
        mixed = part[mask] * (1 - FILL_OPACITY) + colors[i] * FILL_OPACITY
        part[mask] = mixed.round().astype(np.uint8)
    for i in largest_first.tolist():
        window, mask = crops[i]
        picture[window][contour(mask, thickness)] = colors[i]
    return picture


def draw_keypoints(
    picture: np.ndarray,
    keypoints: np.ndarray,
    skeleton: Sequence[tuple[int, int]],
    colors: np.ndarray,
) -> np.ndarray:
    """Returns the picture with the points whose score is at least `POINT_SCORE`, joined by
    the skeleton's lines, each object's in its colour.

    Args:
      keypoints: [n, J, 3].
      skeleton: pairs of points, from 1.
    """
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    radius = max(2, round(min(picture.shape[:2]) / 150))
    for points, color in zip(keypoints, colors.tolist(), strict=True):
        shown = points[:, 2] >= POINT_SCORE
        for a, b in skeleton:
            if shown[a - 1] and shown[b - 1]:
                ends = [tuple(points[j - 1, :2].tolist()) for j in (a, b)]
                draw.line(ends, fill=tuple(color), width=max(1, radius // 2))
        for x, y, _ in points[shown].tolist():
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(box, fill=tuple(color), outline=(255, 255, 255))
    return np.asarray(canvas)


def contour(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Returns the mask's pixels within `thickness` (city-block) of its outside.

    The crop's border counts as outside, so an object cut by the picture is closed too.
    """
    inner = np.pad(mask, 1)
    for _ in range(thickness):
        core = inner.copy()
        core[1:] &= inner[:-1]
        core[:-1] &= inner[1:]
        core[:, 1:] &= inner[:, :-1]
        core[:, :-1] &= inner[:, 1:]
        inner = core
    return mask & ~inner[1:-1, 1:-1]


def draw_labels(picture: np.ndarray, labels: Sequence[Label], colors: np.ndarray) -> np.ndarray:
    """Returns the picture with each label in a box of its object's colour."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    for label in labels:
        color = colors[label.index]
        x0, y0, x1, y1 = label.box
        box = (x0, y0, x1 - 1, y1 - 1)
        draw.rounded_rectangle(box, radius=2, fill=tuple(color.tolist()))
        left, top, _, _ = font(label.font_size).getbbox(label.text)
        corner = (x0 + margin(label.font_size) - left, y0 + 1 - top)
        ink = (0, 0, 0) if color @ LUMA > 130 else (255, 255, 255)
        draw.text(corner, label.text, font=font(label.font_size), fill=ink)
    return np.asarray(canvas)


def text_box(text: str, size: int) -> tuple[int, int]:
    """Returns the width and height in pixels of a label's box."""
    left, top, right, bottom = font(size).getbbox(text)
    return math.ceil(right - left) + 2 * margin(size), math.ceil(bottom - top) + 3


def margin(size: int) -> int:
    """Returns the space left and right of a label's text, pixels."""
    return max(2, size // 6)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Returns Pillow's own font at a height in pixels."""
    loaded = ImageFont.load_default(size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow has no FreeType: reinstall it by pip")
    return loaded
