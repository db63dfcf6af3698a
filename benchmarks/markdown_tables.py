"""Tables of markdown, and the places in a document that they stand in."""

import re
from collections.abc import Mapping, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of markdown; columns of numbers are aligned to the right."""
    columns = list(zip(*rows, strict=True))
    numeric = [all(re.match(r"[\d-]", cell) for cell in c) for c in columns]
    lines = [header, ["--:" if flag else "---" for flag in numeric], *rows]
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
        text = place.sub(lambda m, b=block: f"{m[1]}{b.rstrip()}\n{m[2]}", text)
    return text


def size_words(size: Sequence[int]) -> str:
    """Returns a size in a cell's words."""
    return " x ".join(map(str, size))
