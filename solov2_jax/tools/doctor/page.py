"""A report on data as one HTML page that holds all of its charts and pictures."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from solov2_jax.data.images import read_image
from solov2_jax.data.rasterize import select_spans
from solov2_jax.inference.draw import distinct_colors, draw_objects, shrink
from solov2_jax.io import make_folder, write_text
from solov2_jax.rle import spans_to_crop
from solov2_jax.tools import charts, html
from solov2_jax.tools.doctor.data_report import VERDICTS, DataReport, Part, spread
from solov2_jax.tools.doctor.findings import NOTE, class_counts
from solov2_jax.tools.doctor.grids import GridCollisions, Layout, table
from solov2_jax.tools.doctor.measure import draw, resize_map

LONGEST = 520  # pixels of a picture's longer side


def write_page(report: DataReport, folder: str, number: int) -> str:
    """Returns the path of `report.html`, written into the folder with its charts.

    Args:
      number: pictures per part; a fourth of it for each warning.
    """
    out = make_folder(folder)
    drawn = (
        ("classes", _class_chart),
        ("sizes", _size_chart),
        ("images", _image_chart),
        ("grids", _grid_chart),
    )
    figures = {name: draw_chart(report) for name, draw_chart in drawn if report.parts}
    pictures = charts.write_charts(figures, out)
    grids = [
        (f"{part.name.capitalize()}, the config", report.layout, part.collisions)
        for part in report.parts
    ]
    if advice := report.advice:
        grids.append(("Training, as suggested", advice.layout, advice.collisions))
    galleries = [g for part in report.parts for g in _suspects(part, number)]
    galleries += [
        (f"{part.name.capitalize()}: images and their objects", _samples(part, number))
        for part in report.parts
    ]
    page = html.render(
        "doctor.html",
        title="Data report",
        tile_width=300,
        report=report,
        verdict=VERDICTS[report.verdict],
        counts=[_counts(part) for part in report.parts],
        charts=pictures,
        grids=[(title, table(layout, c), c) for title, layout, c in grids],
        galleries=galleries,
    )
    path = out / "report.html"
    write_text(page, path)
    return str(path)


def _counts(part: Part) -> tuple:
    """Returns the part's row in the table of the data."""
    data, counts = part.dataset, part.dataset.counts
    crowds, most = counts.get("crowds", 0), counts["max_objects"]
    images = (len(data), counts["images_without_objects"])
    return (part.name, *images, len(data.labels), len(data.class_names), crowds, most)


def _samples(part: Part, number: int) -> list[html.PagePicture]:
    """Returns images spread over the part, with their objects."""
    readable = part.readable()
    if not len(readable) or not number:
        return []
    return [_picture(part, int(i)) for i in readable[spread(len(readable), number)]]


def _suspects(part: Part, number: int) -> list[tuple[str, list[html.PagePicture]]]:
    """Returns some pictures for each warning or error that names images, with a title."""
    readable, most = set(part.readable().tolist()), max(2, number // 4) if number else 0
    galleries = []
    for finding in part.findings:
        chosen = [i for i in finding.images if i in readable][:most]
        if chosen and finding.level != NOTE:
            pictures = [_picture(part, i) for i in chosen]
            galleries.append((f"{part.name.capitalize()}: {finding.text}", pictures))
    return galleries


def _picture(part: Part, index: int) -> html.PagePicture:
    """Returns an image with all its objects."""
    data = part.dataset
    image = shrink(read_image(data.path(index), data.pixels), LONGEST)
    objects = np.arange(data.start[index], data.start[index + 1])
    spans, _ = draw(data, objects, resize_map(data, index, (image.shape[0], image.shape[1])))
    crops = []
    for position in np.unique(spans.owner):
        crop = spans_to_crop(select_spans(spans, np.array([position]), len(objects)))
        assert crop is not None, "a position that owns a span has a pixel"
        height, width = crop.pixels.shape
        window = slice(crop.top, crop.top + height), slice(crop.left, crop.left + width)
        crops.append((window, crop.pixels > 0))
    painted = Image.fromarray(draw_objects(image, crops, distinct_colors(len(crops))))
    buffer = io.BytesIO()
    painted.save(buffer, "JPEG", quality=85)
    names = [data.class_names[label] for label in data.labels[objects].tolist()]
    classes, count = np.unique(names, return_counts=True)
    order = np.argsort(-count, kind="stable")
    text = ", ".join(f"{count[i]} {classes[i]}" for i in order[:4]) or "no object"
    more = f" and {len(order) - 4} more classes" if len(order) > 4 else ""
    caption = f"{data.file_names[index]}: {text}{more}"
    url = html.data_url(buffer.getvalue(), "jpeg")
    return html.PagePicture(url, painted.width, caption)


def _class_chart(report: DataReport) -> Figure:
    """Returns the objects of each class; of many, the most and the fewest."""
    first = report.parts[0].dataset
    order = np.argsort(-class_counts(first), kind="stable")
    title = "Objects of each class"
    if len(order) > charts.MAX_BARS:
        half = charts.MAX_BARS // 2
        title += f", the {half} most and the {half} least frequent"
        order = np.concatenate([order[:half], order[-half:]])
    height = 1.2 + 0.12 * len(order) * (1 + len(report.parts))
    figure, (ax,) = charts.panels(10.0, height)
    series = []
    for color, part in zip(charts.COLORS, report.parts, strict=False):
        counts = class_counts(part.dataset)[order].tolist()
        series.append((part.name, color, counts, [str(n) for n in counts]))
    charts.horizontal_bars(ax, [first.class_names[k] for k in order.tolist()], series)
    charts.label(ax, title)
    return figure


def _size_chart(report: DataReport) -> Figure:
    """Returns how large objects are, absolutely and relative to their image."""
    figure, (left, right) = charts.panels(10.0, 3.2, 2)
    sides, shares = {}, {}
    for part in report.parts:
        rows = np.flatnonzero(part.objects.area > 0)
        area = part.objects.area[rows]
        sides[part.name] = np.sqrt(area)
        shares[part.name] = area / part.objects.sizes[part.objects.image[rows]].prod(axis=1)
    charts.histograms(left, sides, np.geomspace(2, 2048, 41), [4, 16, 64, 256, 1024])
    charts.histograms(right, shares, np.geomspace(1e-5, 1, 41), [1e-4, 1e-3, 0.01, 0.1, 1])
    left.axvline(16, color=charts.GREY, linestyle="--", linewidth=1)
    left.legend(frameon=False, fontsize=9)
    area = f"root of the mask's area, pixels at a short side of {report.short}"
    charts.label(left, "Size of the objects", area, "% of the objects")
    charts.label(right, "Share of the image", "area over the image's", "% of the objects")
    return figure


def _image_chart(report: DataReport) -> Figure:
    """Returns how many objects images have, and how large images are."""
    figure, (left, right) = charts.panels(10.0, 3.2, 2)
    counts = {part.name: part.dataset.objects_per_image for part in report.parts}
    most = max(int(count.max()) for count in counts.values())
    charts.histograms(left, counts, np.linspace(-0.5, most + 0.5, min(most + 2, 42)))
    for color, part in zip(charts.COLORS, report.parts, strict=False):
        sizes = part.dataset.widths, part.dataset.heights
        right.plot(*sizes, "o", color=color, ms=4, alpha=0.35)
    left.legend(frameon=False, fontsize=9)
    limit = 1.05 * max(*right.get_xlim(), *right.get_ylim())
    right.plot([0, limit], [0, limit], color=charts.GREY, linewidth=1, zorder=0)
    right.set(xlim=(0, limit), ylim=(0, limit))
    charts.label(left, "Objects in an image", "objects", "% of the images")
    charts.label(right, "Size of the images", "width, pixels", "height, pixels")
    return figure


def _grid_chart(report: DataReport) -> Figure:
    """Returns the objects per level, and those that share a cell."""
    layouts = [("The config's", report.layout, report.parts[0].collisions)]
    if report.advice:
        layouts.append(("Suggested", report.advice.layout, report.advice.collisions))
    figure, axes = charts.panels(10.0, 3.0, len(layouts))
    for ax, (name, layout, collisions) in zip(axes, layouts, strict=True):
        _levels(ax, name, layout, collisions)
    return figure


def _levels(ax: Axes, name: str, layout: Layout, collisions: GridCollisions) -> None:
    names = [
        f"{grid}²\n{low}-{high}"
        for grid, (low, high) in zip(layout.num_grids, layout.scale_ranges, strict=True)
    ]
    series = [
        ("alone in their cells", charts.BLUE, collisions.objects),
        ("share a cell", charts.RED, collisions.shared),
    ]
    charts.columns(ax, names, series)
    ax.tick_params(axis="x", labelsize=8)
    title = f"{name} grids: {100 * collisions.untrained_share:.1f} % without a cell"
    charts.label(ax, title, "grid, box side in pixels", "objects")
