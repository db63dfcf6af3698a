"""Pages that hold all they show: jinja2 templates with escaping, pictures as data URLs."""

import base64
import functools
from dataclasses import dataclass
from typing import Any

import jinja2


@dataclass(frozen=True)
class PagePicture:
    """A picture of a page, as a URL that holds it."""

    url: str
    width: int  # pixels
    caption: str = ""
    wide: bool = False  # in a row of its own


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("solov2_jax.tools", "templates"),
        autoescape=True,  # names of classes and files are text, never markup
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """Returns a page: `templates/<template>` filled with the values."""
    return _environment().get_template(template).render(**values)


def data_url(data: bytes, kind: str) -> str:
    """Returns a picture's file as a URL that holds it.

    Args:
      kind: "png" or "jpeg".
    """
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
