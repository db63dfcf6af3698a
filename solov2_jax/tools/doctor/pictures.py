"""Pictures of a data set with its annotations, some of them for a reason."""

import base64
import dataclasses
import io

import numpy as np
from PIL import Image

from solov2_jax.data.images import read_image
from solov2_jax.inference.draw import distinct_colors, draw_objects, shrink
from solov2_jax.tools.doctor.findings import NOTE
from solov2_jax.tools.doctor.measure import draw
from solov2_jax.tools.doctor.study import Part

LONGEST = 520  # pixels of a picture's longer side


@dataclasses.dataclass(frozen=True)
class AnnotatedImage:
    """An annotated image as text for a page."""

    url: str
    caption: str


def samples(part: Part, number: int) -> list[AnnotatedImage]:
    """Returns images spread over the part, with their objects."""
    readable = part.readable()
    if not len(readable) or not number:
        return []
    at = np.linspace(0, len(readable) - 1, min(number, len(readable))).round()
    return [picture(part, int(readable[int(i)])) for i in at]


def suspects(part: Part, number: int) -> list[tuple[str, list[AnnotatedImage]]]:
    """Returns up to `number` pictures for each warning or error that names images."""
    readable = set(part.readable().tolist())
    result = []
    for finding in part.findings:
        chosen = [i for i in finding.images if i in readable][:number]
        if chosen and finding.level != NOTE:
            result.append((finding.text, [picture(part, i) for i in chosen]))
    return result


def picture(part: Part, index: int) -> AnnotatedImage:
    """Returns an image with all its objects."""
    data = part.dataset
    image = shrink(read_image(data.path(index)), LONGEST)
    old = int(data.heights[index]), int(data.widths[index])
    new = image.shape[0], image.shape[1]
    rows = range(int(data.start[index]), int(data.start[index + 1]))
    crops = []
    for a in rows:
        if (crop := draw(data, a, old, new)) is not None:
            height, width = crop.pixels.shape
            window = slice(crop.top, crop.top + height), slice(crop.left, crop.left + width)
            crops.append((window, crop.pixels > 0))
    painted = draw_objects(image, crops, distinct_colors(len(crops)))
    names = [data.class_names[data.labels[a]] for a in rows]
    classes, count = np.unique(names, return_counts=True)
    order = np.argsort(-count, kind="stable")
    text = ", ".join(f"{count[i]} {classes[i]}" for i in order[:4]) or "no object"
    more = f" and {len(order) - 4} more classes" if len(order) > 4 else ""
    name = str(data.file_names[index])
    return AnnotatedImage(data_url(painted), f"{name}: {text}{more}")


def data_url(image: np.ndarray, quality: int = 85) -> str:
    """Returns the picture as text that an HTML page shows."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
