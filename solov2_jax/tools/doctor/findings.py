"""What is wrong with a data set, in one form for console, page and log."""

import dataclasses
from collections.abc import Sequence

# Training may not start; look at it; good to know.
ERROR, WARNING, NOTE = "error", "warning", "note"
MAX_EXAMPLES = 12  # kept per finding


@dataclasses.dataclass(frozen=True)
class Finding:
    """One kind of problem, with how often and where."""

    level: str
    text: str
    examples: tuple[str, ...] = ()
    images: tuple[int, ...] = ()  # indices in the data set, for pictures

    def line(self) -> str:
        """Returns the finding as one line."""
        where = f": {', '.join(self.examples[:5])}" if self.examples else ""
        more = ", ..." if len(self.examples) > 5 else ""
        return f"{self.level}: {self.text}{where}{more}"


def one_finding(
    level: str,
    text: str,
    examples: Sequence[str] = (),
    images: Sequence[int] = (),
) -> list[Finding]:
    """Returns one finding; texts name the count themselves."""
    kept = tuple(examples[:MAX_EXAMPLES])
    return [Finding(level, text, kept, tuple(dict.fromkeys(images))[:MAX_EXAMPLES])]


def worst(findings: Sequence[Finding]) -> str:
    """Returns the gravest level, NOTE if there is none."""
    levels = {f.level for f in findings}
    return next((level for level in (ERROR, WARNING) if level in levels), NOTE)


def share(part: int, of: int) -> str:
    """Returns e.g. "3 of 40 (7.5 %)"."""
    return f"{part} of {of} ({100 * part / of:.1f} %)" if of else f"{part} of 0"
