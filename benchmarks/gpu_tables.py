"""The tables of a run of gpu.py, from results/gpu.json."""

from collections.abc import Mapping
from typing import Any

from markdown import table


def render(content: Mapping[str, Any]) -> str:
    """Returns all tables, and what is missing."""
    ours, torch = content["ours"], content["torch"]
    parts = [
        f"{content['config']}, {content['size'][0]} x {content['size'][1]}, "
        f"{content['total_s']:.0f} s in all; ours {ours['about']}, "
        f"torch {torch.get('about') or 'missing'}",
        rates(ours["jobs"], torch.get("jobs", {})),
        post(ours["jobs"]),
        costs(ours["jobs"]),
        "\n".join(disagreements(ours["jobs"], torch.get("jobs", {}))),
        missing(content),
    ]
    return "\n\n".join(part for part in parts if part)


def rates(ours: Mapping[str, Any], torch: Mapping[str, Any]) -> str:
    """Returns images a second of each work, ours beside torch's."""
    works = [job for job in ours if job.startswith(("train:", "infer:"))]
    works += [w for job in torch if (w := job.rpartition(":")[0]) not in works]
    rows = []
    for job in dict.fromkeys(works):
        mine = ours.get(job, {})
        cells = [_cell(mine, "images_per_s", "{:.1f}")]
        cells.append(_cell(mine, "share_of_matmul", "{:.0%}"))
        cells.append(_cell(mine, "program_gb", "{:.1f}"))
        cells.append(_cell(mine, "compile_s", "{:.0f}"))
        for form in ("eager", "compile"):
            peer = torch.get(f"{job}:{form}", {})
            cells.append(_cell(peer, "images_per_s", "{:.1f}"))
            ratio = "-"
            if "images_per_s" in mine and "images_per_s" in peer:
                ratio = f"{mine['images_per_s'] / peer['images_per_s']:.2f}"
            cells += [ratio, _cell(peer, "peak_gb", "{:.1f}")]
        rows.append((job.replace(":", " "), *cells))
    header = ["work, precision, batch", "images/s", "of matmul", "GB", "compile s"]
    for form in ("torch eager", "torch.compile"):
        header += [f"{form} images/s", "ours / it", "GB"]
    matmul = {job: j for job, j in ours.items() if job.startswith("matmul:")}
    lines = [
        f"{job}: {_cell(found, 'flops_per_s', '{:.4g}')} FLOP/s" for job, found in matmul.items()
    ]
    return "\n".join(lines) + "\n\n" + (table(header, rows) if rows else "")


def post(ours: Mapping[str, Any]) -> str:
    """Returns the time of post-processing."""
    rows = [
        (
            job.replace(":", " "),
            str(found["kept"]),
            f"{1e3 * found['detect']['median']:.2f}",
            f"{1e3 * found['paste_to_host']['median']:.2f}",
        )
        for job, found in ours.items()
        if job.startswith("post:") and "kept" in found
    ]
    header = ("post-processing", "masks kept", "detect ms", "paste, to the host, ms")
    return table(header, rows) if rows else ""


def costs(ours: Mapping[str, Any]) -> str:
    """Returns the largest costs of the profiled steps."""
    rows = [
        (job.replace(":", " "), kind, c["name"], f"{c['ms']:.2f}", f"{c['share']:.0%}")
        for job, found in ours.items()
        if job.startswith("profile:")
        for kind in ("modules", "operations")
        for c in found.get(kind, [])
    ]
    return table(("profile", "by", "name", "ms", "share"), rows) if rows else ""


def disagreements(
    ours: Mapping[str, Any], torch: Mapping[str, Any], tolerance: float = 0.03
) -> list[str]:
    """Returns a line for each first loss that differs: then the work was not the same.

    Args:
      tolerance: relative; bfloat16 alone makes some thousandths.
    """
    lines = []
    for job, peer in torch.items():
        mine = ours.get(job.rpartition(":")[0], {})
        if "first_loss" in mine and "first_loss" in peer:
            a, b = mine["first_loss"], peer["first_loss"]
            if abs(a - b) > tolerance * abs(b):
                lines.append(f"{job}: the first loss is {a:.4f}, torch's {b:.4f}")
    return lines


def missing(content: Mapping[str, Any]) -> str:
    """Returns a line for each figure that there is not."""
    lines = []
    for side in ("ours", "torch"):
        found = content[side]
        if why := found.get("missing"):
            lines.append(f"{side}: not measured, {why}")
        for job, figures in found.get("jobs", {}).items():
            for reason in ("skipped", "failed"):
                if reason in figures:
                    lines.append(f"{side} {job}: {reason}, {figures[reason]}")
    return "\n".join(lines)


def _cell(found: Mapping[str, Any], key: str, form: str) -> str:
    return form.format(found[key]) if found.get(key) is not None else "-"
