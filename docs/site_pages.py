"""Builds the documentation's site: `python docs/site_pages.py build` or `serve`.

The files are written to be read in the repository, too. This writes what a site
generator needs into build/pages, plain Markdown: links that leave `docs/` become links to
pages of the site, notebooks are pages with their cells, the configuration's tables are
filled in. Then mkdocs makes build/site of it; any generator that takes Markdown could.
"""

import argparse
import json
import pathlib
import posixpath
import re
import shutil
import subprocess
import sys
from typing import Any
from xml.sax.saxutils import quoteattr

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import config_keys  # noqa: E402

PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"
# Files of the repository outside of docs/ that are pages.
OUTSIDE = {
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
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


def main(command: str, options: list[str]) -> int:
    """Returns the exit code of `build` or `serve`."""
    write_pages(PAGES)
    mkdocs = [sys.executable, "-m", "mkdocs", command, "--config-file", str(ROOT / "mkdocs.yml")]
    code = subprocess.call([*mkdocs, *options], cwd=ROOT)
    if code or command != "build":
        return code
    return finish(SITE)


def write_pages(folder: pathlib.Path) -> None:
    """Writes every page, and the files that pages show, into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(ROOT / "docs", folder, ignore=ignored)
    for page in folder.rglob("*.md"):
        name = page.relative_to(folder).as_posix()
        page.write_text(convert(page.read_text("utf-8"), name), "utf-8")
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text("utf-8")
        target_file = folder / page
        target_file.parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".ipynb"):
            text = notebook_page(json.loads(text), posixpath.basename(source))
            shutil.copy(ROOT / source, target_file.parent)  # the page links to it
        target_file.write_text(convert(text, page), "utf-8")


def finish(site: pathlib.Path) -> int:
    """Lets long names of the built pages break; returns 1 if a page loads from elsewhere."""
    code = 0
    for page in sorted(site.rglob("*.html")):
        html = page.read_text("utf-8")
        page.write_text(breakable_html(html), "utf-8")
        if match := LOADS.search(html):
            print(f"{page.relative_to(site)} loads from elsewhere: {match[0]}", file=sys.stderr)
            code = 1
    return code


def breakable_html(html: str) -> str:
    """Returns a page in which long names may break, and pairs of numbers may not."""
    html = _PAIR.sub(lambda match: match[0].replace(" ", "&nbsp;"), html)
    return _LONG.sub(lambda match: f"<code{match[1]}>{breakable(match[2])}</", html)


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Builds the documentation's site.")
    parser.add_argument("command", nargs="?", choices=("build", "serve"), default="build")
    arguments, options = parser.parse_known_args()  # mkdocs has options of its own
    sys.exit(main(arguments.command, options))
