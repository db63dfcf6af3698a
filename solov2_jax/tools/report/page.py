"""The report's HTML: text and tables around pictures that are inside the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from solov2_jax.evaluation.coco import FIGURES, figure
from solov2_jax.tools.report.analysis import ERRORS, ImageRow
from solov2_jax.tools.report.page_style import SCRIPT, STYLE
from solov2_jax.tools.report.study import ClassRow, ReportData

MEANINGS = {
    "localisation": "the right class, but the mask fits an object only with IoU 0.1 to 0.5",
    "class": "the mask is an object's (IoU 0.5 or more), the class is not",
    "both": "touches an object (IoU 0.1 or more), and neither class nor mask fit",
    "duplicate": "fits an object that a better scored detection has taken",
    "background": "touches no object (IoU below 0.1)",
    "missed": "an object that no detection is about",
}
PARTS = {
    "data": "waiting for images",
    "compute": "network, NMS and masks at full size",
    "encode": "waiting for the masks' encoder, which works beside it",
}
MAX_CONFUSED = 8  # pairs of classes that are named


@dataclass(frozen=True)
class Chart:
    """A picture of numbers."""

    url: str
    width: int  # in the page, pixels


@dataclass(frozen=True)
class GalleryImage:
    """A picture of the gallery."""

    row: ImageRow
    name: str
    url: str
    wide: bool  # in a row of its own


def page(study: ReportData, charts: Mapping[str, Chart], pictures: Sequence[GalleryImage]) -> str:
    """Returns the page.

    Args:
      charts: by the names in `charts.charts`.
    """
    sections = [
        _figures(study),
        _section("What goes wrong", _errors(study), charts["errors"]),
        _section("Which score to cut at", _curves(study), charts["curves"]),
        _section("Classes", _classes(study), charts["classes"]),
        _section("Mistaken for each other", _confusion(study), charts["confusion"]),
        _section("Sizes", _sizes(study), charts["sizes"]),
        _section("Scores", _calibration(study), charts["calibration"]),
    ]
    if study.speed:
        sections.append(_section("Time", _speed(study)))
    sections.append(_section("The worst images", _gallery(study, pictures)))
    title = escape(study.title)
    facts = " · ".join(f"{escape(k)}: {escape(v)}" for k, v in study.facts.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{title}</h1><p class="soft">{facts}</p>{"".join(sections)}'
        f"</main><script>{SCRIPT}</script></body></html>\n"
    )


def _section(title: str, content: str, chart: Chart | None = None) -> str:
    image = ""
    if chart:
        style = f'style="width: {chart.width}px" alt="{escape(title)}"'
        image = f'<img src="{chart.url}" {style}>'
    text, _, after = content.partition("<!--chart-->")
    return f"<section><h2>{escape(title)}</h2>{text}{image}{after}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Returns a table; cells are HTML, and those that are whole <td> stay.

    Args:
      head: plain text, with "<" in front where the column is aligned to the left.
    """
    cells = ("".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row) for row in rows)
    names = "".join(
        f'<th class="text">{escape(h[1:])}</th>' if h[:1] == "<" else f"<th>{escape(h)}</th>"
        for h in head
    )
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<table class="{kind}"><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>'


def _figures(study: ReportData) -> str:
    tiles = "".join(
        f'<div class="tile{" first" if name == "AP" else ""}">'
        f"<b>{figure(study.metrics[f'segm/{name}'])}</b><span>mask {name}</span></div>"
        for name in FIGURES[:6]
    )
    rows = [
        [kind, *(figure(study.metrics[f"{key}/{name}"]) for name in FIGURES)]
        for kind, key in (("masks", "segm"), ("boxes", "bbox"))
    ]
    notes = "".join(f'<div class="note">{escape(r)}</div>' for r in study.reasons)
    return (
        f'<section><h2>Figures of COCO</h2><div class="tiles">{tiles}</div>'
        f"{notes}{_table(['', *FIGURES], rows)}"
        '<p class="soft">AP: the mean over IoU 0.5 to 0.95. s, m, l: objects below '
        "32², up to 96², above. AR: recall with 1, 10, 100 detections an image. "
        "“-”: nothing of that kind is annotated.</p></section>"
    )


def _errors(study: ReportData) -> str:
    split = study.errors
    worst = max(ERRORS, key=lambda e: split.gains[e])
    text = f"AP50 is {split.ap50:.3f}."
    if split.gains[worst] > 0:
        text += (
            f" Most is lost by <b>{worst}</b> errors: without them it would be "
            f"{split.ap50 + split.gains[worst]:.3f}."
        )
    rows = [
        [
            f"<td>{e}</td>",
            f'<td class="text">{escape(MEANINGS[e])}</td>',
            str(study.shown_errors[e]),
            str(split.counts[e]),
            f"{split.gains[e]:+.4f}",
        ]
        for e in ERRORS
    ]
    return (
        f"<p>{text}</p><!--chart-->"
        + _table(
            [
                "kind",
                "<what it is",
                f"from {study.threshold:.3f} on",
                "all",
                "AP50 gain",
            ],
            rows,
        )
        + '<p class="soft">Gains are those of all detections, as AP sees them; they do '
        "not add up, because mending one kind changes what the others cost. Missed "
        "from a score on: every object without a right detection; missed in all: "
        "those that no localisation or class error is about.</p>"
    )


def _curves(study: ReportData) -> str:
    precision, recall, f1 = study.curve.at(study.threshold)
    return (
        f"<p>F1 of all classes together is largest from score "
        f"<b>{study.threshold:.3f}</b> on: precision {precision:.3f}, recall "
        f"{recall:.3f}, F1 {f1:.3f}. What follows uses this threshold, and "
        f"<code>predict.py --score {study.threshold:.3f}</code> draws what it keeps."
        "</p><!--chart-->"
    )


def _classes(study: ReportData) -> str:
    def ap(row: ClassRow) -> str:
        bar = f'<i class="bar" style="width:{110 * max(row.ap, 0):.0f}px"></i>'
        text = f'<td class="text" data-value="{row.ap}">'
        return f"{text}{bar}{figure(row.ap)}</td>"

    rows = [
        [
            escape(r.name),
            ap(r),
            str(r.objects),
            str(r.predictions),
            f"{r.threshold:.3f}",
            f"{r.precision:.3f}",
            f"{r.recall:.3f}",
            f"{r.f1:.3f}",
        ]
        for r in study.classes
    ]
    head = [
        "class",
        "<mask AP",
        "objects",
        "predictions",
        "best threshold",
        "precision",
        "recall",
        "F1",
    ]
    return (
        "<!--chart--><p>Precision, recall and F1 are those at IoU 0.5 from the class's "
        "own best threshold on. A click on a column's name sorts by it.</p>"
        f'<div class="scroll">{_table(head, rows, "sort")}</div>'
    )


def _confusion(study: ReportData) -> str:
    matrix = study.confusion[:-1, :-1].copy()
    np.fill_diagonal(matrix, 0)
    pairs = [
        [
            escape(study.names[i]),
            f'<td class="text">{escape(study.names[j])}</td>',
            str(matrix[i, j]),
        ]
        for i, j in zip(*np.unravel_index(np.argsort(-matrix, None), matrix.shape), strict=True)
        if matrix[i, j]
    ][:MAX_CONFUSED]
    table = (
        _table(["annotated", "<predicted", "times"], pairs)
        if pairs
        else ("<p>No object was taken for another class.</p>")
    )
    return (
        "<p>Objects and detections paired by mask IoU (0.5 or more), whatever their "
        "classes. Shades are shares of a row.</p><!--chart-->" + table
    )


def _sizes(study: ReportData) -> str:
    objects = sum(r.objects for r in study.sizes)
    found = sum(r.found for r in study.sizes)
    return f"<p>{found} of {objects} objects are found at the threshold.</p>"


def _calibration(study: ReportData) -> str:
    return (
        "<p>On the dashed line, of the detections with score 0.7 seven in ten would be "
        f"right (IoU 0.5). The mean distance is {study.calibration.error:.3f}; below "
        "the line scores promise too much.</p><!--chart-->"
    )


def _speed(study: ReportData) -> str:
    rows = [[PARTS[name], f"{value:.1f}"] for name, value in study.speed.items()]
    return _table(["part", "ms an image"], rows) + (
        '<p class="soft">Without the first batch of each shape, which compiles.</p>'
    )


def _gallery(study: ReportData, pictures: Sequence[GalleryImage]) -> str:
    if not pictures:
        return "<p>Every object was found, and nothing else.</p>"
    text = (
        f"<p>Lowest F1 first, at score {study.threshold:.3f}: annotated left, "
        'predicted right.</p><div class="gallery">'
    )
    for p in pictures:
        row = p.row
        text += (
            f'<figure class="{"wide" if p.wide else ""}"><img src="{p.url}" alt="">'
            f"<figcaption>{escape(p.name)}: "
            f"{row.objects} objects, {row.right} found, {row.missed} missed, "
            f"{row.false} false; F1 {row.f1:.2f}</figcaption></figure>"
        )
    return f"{text}</div>"
