"""`metrics.jsonl` and `metrics.csv` of a run, written line by line and read again."""

import csv
import json
import logging
import pathlib
from typing import Any

from solov2_jax.io import InputError, reading

log = logging.getLogger("solov2_jax")


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, {"step": 20, "loss": 3.1, ...}; [] without one.

    A last line that a kill cut short is left out.

    Raises:
      InputError: naming file and line, for any other that is not such an object.
    """
    text_lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    lines = []
    for i, text in enumerate(text_lines, 1):
        try:
            with reading(f"{path}, line {i}", 'JSON such as {"step": 20}', _fix_line(path)):
                line = json.loads(text.decode())
                if type(line["step"]) is not int:
                    raise TypeError("step is not a whole number")
        except InputError:
            if i < len(text_lines) or text.endswith(b"\n"):
                raise
            log.warning("%s: dropped the last line, which is incomplete", path)
        else:
            lines.append(line)
    return lines


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    """Returns the rows of a metrics.csv, {"step": "20", ...}; [] without one.

    A last row that a kill cut short is left out.

    Raises:
      InputError: naming file and line, for a step that is not a whole number, or text
        that is not UTF-8.
    """
    data = path.read_bytes() if path.is_file() else b""
    if data and not data.endswith(b"\n"):
        log.warning("%s: dropped the last row, which is incomplete", path)
        data = data[: data.rfind(b"\n") + 1]
    lines = []
    for i, text in enumerate(data.splitlines(), 1):
        with reading(f"{path}, line {i}", "a row of metrics", _fix_line(path)):
            lines.append(text.decode())
    rows = list(csv.DictReader(lines))
    for i, row in enumerate(rows, 2):
        with reading(f"{path}, line {i}", "a row of metrics", _fix_line(path)):
            if None in row or not row["step"].isdigit():
                raise ValueError("the first column is not a step, or there are too many columns")
    return rows


def _fix_line(path: pathlib.Path) -> str:
    return f"Delete that line, or move {path.name} away"
