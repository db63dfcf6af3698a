"""A study as one HTML page that holds all of its pictures."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from solov2_jax.tools.doctor.charts import charts, png
from solov2_jax.tools.doctor.findings import ERROR, NOTE, WARNING
from solov2_jax.tools.doctor.grids import Crowding, Layout, table
from solov2_jax.tools.doctor.pictures import AnnotatedImage, samples, suspects
from solov2_jax.tools.doctor.study import DataStudy

STYLE = """
:root { --ink: #24292f; --soft: #5f6873; --line: #e2e5e9; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 8px; }
h3 { font-size: 15px; margin: 14px 0 6px; }
.soft, figcaption { color: var(--soft); font-size: 13.5px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 22px; margin-top: 18px; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-size: 14px; margin: 8px 0;
  font-variant-numeric: tabular-nums; }
th, td { padding: 4px 18px 4px 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
ul { list-style: none; padding: 0; margin: 0; }
li { padding: 7px 12px; margin: 6px 0; border-radius: 8px; border: 1px solid; }
li.error { background: #fdecea; border-color: #f1b5ae; }
li.warning { background: #fff7e6; border-color: #f0d9a8; }
li.note { background: #f1f5fa; border-color: #d3dfec; }
li small { color: var(--soft); display: block; overflow-wrap: anywhere; }
.verdict { display: inline-block; padding: 4px 14px; border-radius: 16px;
  color: #fff; font-weight: 600; margin: 6px 0; }
.verdict.error { background: #b0413e; } .verdict.warning { background: #b3781b; }
.verdict.note { background: #3d8f5f; }
pre { background: #f6f8fa; border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; overflow: auto; font-size: 13px; }
.gallery { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
figure { margin: 0; } figcaption { overflow-wrap: anywhere; }
"""
VERDICTS = {
    ERROR: "Training cannot start before the errors are mended",
    WARNING: "Training may start; look at the warnings",
    NOTE: "Training may start",
}


def write_page(study: DataStudy, folder: str, number: int) -> str:
    """Returns the path of `report.html`, written into the folder with its charts.

    Args:
      number: pictures per part; a fourth of it for each warning.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    images = {}
    if study.parts:
        for name, figure in charts(study).items():
            images[name] = png(figure)
            (out / f"{name}.png").write_bytes(images[name])
    path = out / "report.html"
    path.write_text(page(study, images, number), "utf-8")
    return str(path)


def page(study: DataStudy, images: dict[str, bytes], number: int) -> str:
    """Returns the page; `images` are the charts, by name."""
    sections = [_section("Findings", _findings(study))]
    if study.parts:
        sections.append(_section("Data", _counts(study)))
    for name, title in (
        ("classes", "Classes"),
        ("sizes", "Sizes of the objects"),
        ("images", "Images"),
    ):
        if name in images:
            sections.append(_section(title, _chart(images[name])))
    if study.parts:
        sections.append(_section("Grid cells", _grids(study, images["grids"])))
    if study.advice:
        reasons = "".join(f"<p>{escape(_upper(r))}.</p>" for r in study.advice.reasons)
        flags = escape(" \\\n    ".join(study.advice.overrides()))
        sections.append(_section("Suggested settings", f"{reasons}<pre>{flags}</pre>"))
    for part in study.parts:
        for text, found in suspects(part, max(2, number // 4) if number else 0):
            title = f"{_upper(part.name)}: {text}"
            sections.append(_section(title, _gallery(found)))
    for part in study.parts:
        title = f"{_upper(part.name)}: images and their objects"
        sections.append(_section(title, _gallery(samples(part, number))))
    files = " · ".join(escape(p.dataset.annotation_file) for p in study.parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Data report</title><style>{STYLE}</style></head><body><main>"
        f'<h1>Data report</h1><p class="soft">{files}</p>'
        f'<div class="verdict {study.verdict}">{VERDICTS[study.verdict]}</div>'
        f"{''.join(sections)}</main></body></html>\n"
    )


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _chart(image: bytes) -> str:
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    return f'<img src="{url}" alt="">'


def _findings(study: DataStudy) -> str:
    items = []
    named = [("", study.findings), *((p.name, p.findings) for p in study.parts)]
    for level in (ERROR, WARNING, NOTE):
        for name, findings in named:
            for f in findings:
                if f.level != level:
                    continue
                where = f"{_upper(name)}: " if name else ""
                small = "; ".join(escape(e) for e in f.examples)
                text = f"<b>{level}</b> {escape(where + f.text)}"
                items.append(f'<li class="{level}">{text}<small>{small}</small></li>')
    return f"<ul>{''.join(items)}</ul>" if items else "<p>Nothing to complain about.</p>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows[1:])
    return f"<table><tr>{head}</tr>{body}</table>"


def _counts(study: DataStudy) -> str:
    rows = [["", "images", "without objects", "objects", "classes", "crowds", "most"]]
    for part in study.parts:
        data, counts = part.dataset, part.dataset.counts
        numbers = (
            *(len(data), counts["images_without_objects"], len(data.labels)),
            *(len(data.class_names), counts.get("crowds", 0), counts["max_objects"]),
        )
        rows.append([part.name, *map(str, numbers)])
    return _table(rows) + '<p class="soft">most: objects in one image</p>'


def _grids(study: DataStudy, image: bytes) -> str:
    def block(title: str, layout: Layout, crowd: Crowding) -> str:
        text = (
            f"{len(crowd.lost)} of {crowd.total} objects have no cell of their own, "
            f"{len(crowd.homeless)} are outside of all ranges."
        )
        return f"<h3>{escape(title)}</h3>{_table(table(layout, crowd))}<p>{text}</p>"

    text = (
        "<p>A cell has one class and one mask: where two objects share one, the later "
        "in the json gives it its class, and its kernel learns both masks.</p>"
    )
    text += _chart(image)
    for part in study.parts:
        text += block(f"{_upper(part.name)}, the config", study.layout, part.crowd)
    if study.advice:
        text += block("Training, as suggested", study.advice.layout, study.advice.crowd)
    return text


def _gallery(pictures: Sequence[AnnotatedImage]) -> str:
    figures = "".join(
        f'<figure><img src="{p.url}" alt=""><figcaption>{escape(p.caption)}</figcaption></figure>'
        for p in pictures
    )
    return f'<div class="gallery">{figures}</div>' if figures else "<p>None.</p>"
