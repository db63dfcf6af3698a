"""What the site makes of the Markdown files: their links, pictures and generated parts.

The files are written to be read in the repository, too. Links that leave `docs/` become
links to pages of the site, or the build fails. Notebooks are pages with their cells.
"""

import json
import logging
import pathlib
import posixpath
import re
import sys
from typing import Any
from xml.sax.saxutils import quoteattr

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # `mkdocs` alone does not look there
import config_keys  # noqa: E402

log = logging.getLogger("mkdocs.hooks.site_pages")

# Files of the repository outside of docs/ that are pages.
OUTSIDE = {
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "notebooks/from_detectron2.ipynb": "notebooks/from_detectron2.md",
    "notebooks/predict.ipynb": "notebooks/predict.md",
    "notebooks/train_on_your_data.ipynb": "notebooks/train_on_your_data.md",
}
# Files that a page stands for.
STANDS_FOR = {"README.md": "index.md", "configs/base.py": "configuration.md"}
GENERATED = {
    "<!-- every key -->": config_keys.tables,
    "<!-- variants -->": config_keys.variants,
}

_LINK = re.compile(r"(?<=\]\()([^)\s:]+)(?=\))")
_SVG = re.compile(r"!\[([^\]]*)\]\(([\w./-]+\.svg)\)")
_COMMENT = re.compile(r"^<!--.*?-->\n", re.M)
_LONG = re.compile(r"<code([^>]*)>([^\s<>&]{40,})</")
_PAIR = re.compile(r"(?<=>)[\d.]+ / [\d.]+(?=</td>)")
LOADS = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//"
    r"|<link\b[^>]*\bhref=[\"']?(?:https?:)?//"
)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that lie outside of docs/, and the notebooks beside theirs."""
    for source, page in OUTSIDE.items():
        path = ROOT / source
        if path.suffix == ".ipynb":
            text = notebook_page(json.loads(path.read_text("utf-8")), path.name)
            files.append(File.generated(config, page, content=text))
            page = source
        files.append(File.generated(config, page, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Returns a page's Markdown as the site shows it."""
    return convert(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Returns a page's HTML in which long names may break, and pairs of numbers not."""
    html = _PAIR.sub(lambda match: match[0].replace(" ", "&nbsp;"), html)
    return _LONG.sub(lambda match: f"<code{match[1]}>{breakable(match[2])}</", html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warns of a page that loads anything from another host."""
    if found := LOADS.search(output):
        log.warning("%s loads from elsewhere: %s", page.file.src_uri, found[0])
    return output


def convert(markdown: str, page: str) -> str:
    """Returns the Markdown of `page`, such as "data.md", as the site shows it."""
    for mark, text in GENERATED.items():
        if mark in markdown:
            markdown = markdown.replace(mark, text())
    markdown = _COMMENT.sub("\n", markdown)  # beside a table it would hide the table
    markdown = _SVG.sub(lambda match: _picture(match[1], match[2]), markdown)
    return _LINK.sub(lambda match: target(match[1], page), markdown)


def notebook_page(notebook: dict[str, Any], name: str) -> str:
    """Returns a notebook's cells as Markdown, the title first, with a link to the file.

    Args:
      name: of the file, which lies beside the page.
    """
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        code = cell["cell_type"] == "code"
        parts.append(f"```python\n{text}\n```" if code else text)
    title = next(i for i, part in enumerate(parts) if part.startswith("# "))
    link = f'The notebook: <a href="{name}" download>{name}</a>.'
    return "\n\n".join([parts.pop(title), link, *parts])


def breakable(name: str) -> str:
    """Returns a long name with places where it may break: after "/", else anywhere."""
    parts = re.findall(r"[^/]{1,16}/?" if "/" not in name else r"[^/]*/|[^/]+", name)
    return "<wbr>".join(parts)


def target(link: str, page: str) -> str:
    """Returns a relative link of a file of the repository as a link of its page."""
    path, mark, anchor = link.partition("#")
    source = {v: k for k, v in OUTSIDE.items()}.get(page, f"docs/{page}")
    place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    known = {**OUTSIDE, **STANDS_FOR}
    if place in known:
        place = known[place]
    elif place.startswith("docs/"):
        place = place.removeprefix("docs/")
    else:
        return link  # mkdocs says that there is no such page
    if not path:
        return link
    return posixpath.relpath(place, posixpath.dirname(page) or ".") + mark + anchor


def _picture(title: str, path: str) -> str:
    """Returns a drawing as part of the page, so that it has the page's colours."""
    svg = (ROOT / "docs" / path).read_text("utf-8")
    label = f'<svg role="img" aria-label={quoteattr(title)}'
    svg = re.sub(r"\n\s*\n", "\n", svg.replace("<svg", label, 1)).strip()
    return f"<div>\n{svg}\n</div>"
