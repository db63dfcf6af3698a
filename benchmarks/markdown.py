"""Tables of markdown, and documents that hold them between two comments."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table; columns of numbers are aligned to the right."""
    columns = list(zip(*rows, strict=True))
    numbers = [all(re.match(r"[\d-]", cell) for cell in c) for c in columns]
    lines = [header, ["--:" if flag else "---" for flag in numbers], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """Returns a document with the blocks between `<!-- NAME -->` and `<!-- end -->`.

    Raises:
      ValueError: for a block that the document has no place for.
    """
    for name, block in blocks.items():
        place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
        if not place.search(text):
            raise ValueError(f"no place <!-- {name} --> ... <!-- end --> in the text")
        text = place.sub(lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text)
    return text


def fill_file(path: Path, blocks: Mapping[str, str]) -> None:
    """Writes the blocks into a document."""
    path.write_text(fill(path.read_text(), blocks))
