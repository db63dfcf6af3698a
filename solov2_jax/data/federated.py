"""What an LVIS json says beside COCO's fields: which categories were looked for where.

Source: LVIS v1's data format, lvisdataset.org; `neg_category_ids`,
`not_exhaustive_category_ids` of images, `frequency` of categories.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from solov2_jax.data.fields import Fields, whole_number
from solov2_jax.io import InputError


@dataclasses.dataclass(frozen=True)
class Federated:
    """Which categories each image was searched for: LVIS, where none was for all of them.

    A category that an image neither shows nor lists as negative says nothing about it.
    """

    negative: dict[int, frozenset[int]]  # image id -> categories that it does not show
    not_exhaustive: dict[int, frozenset[int]]  # image id -> categories with objects left out
    # Category id -> "r", "c" or "f": in fewer than 10, in fewer than 100, or in more
    # training images; "" where the file does not say.
    frequency: dict[int, str]


# Of an image: lists of category ids.
SEARCHED = ("neg_category_ids", "not_exhaustive_category_ids")


def read_federated(
    content: Mapping[str, Any], image_ids: list[int], category_ids: list[int], source: str
) -> Federated | None:
    """Returns what an LVIS json says of its images; None of any other json."""
    records, known = content["images"], set(category_ids)
    if not any(key in record for record in records for key in SEARCHED):
        return None
    field = Fields(records, source, lambda i: f"image {image_ids[i]}")

    def categories(value: Any) -> frozenset[int] | None:
        ids = frozenset(map(whole_number, value)) if isinstance(value, list) else {None}
        return None if ids - known else frozenset(i for i in ids if i is not None)

    lists = [field(key, categories, "a list of category ids", frozenset[int]()) for key in SEARCHED]
    for key, values in zip(SEARCHED, lists, strict=True):
        if missing := [i for i, record in enumerate(records) if key not in record]:
            raise InputError(
                f"{field.name(missing[0])}: has no `{key}` ({len(missing)} of {len(values)} have "
                "none), and other images do; LVIS wants it of each, [] for none."
            )
    kinds = Fields(
        content["categories"], source, lambda i: f"category {content['categories'][i]['id']}"
    )
    values = kinds("frequency", lambda v: v if v in ("r", "c", "f") else None, "r, c or f", "")
    ids = kinds("id", whole_number, "a whole number")
    negative, not_exhaustive = (dict(zip(image_ids, v, strict=True)) for v in lists)
    return Federated(negative, not_exhaustive, dict(zip(ids, values, strict=True)))
