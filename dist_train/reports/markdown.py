"""Names and texts of files in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dist_train.errors import printable

# what begins emphasis, code, links, HTML, entities, formulas, mentions, emoji, addresses or a table's cell
_SPECIAL = re.compile(r"[!#$&*:<>@\[\\\]^_`{|}~]|(?<=www)\.", re.IGNORECASE)


def literal(text: str) -> str:
    """Text that Markdown, also GitHub's and Hugging Face's, shows as it is, inside a line."""
    return _SPECIAL.sub(r"\\\g<0>", printable(text))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: Sequence[str] = ()) -> str:
    """A table, with a line break at its end. The cells are Markdown: `literal` where they have names or texts of files.
    align: of each column, in Markdown; empty: to the left."""
    lines = [header, align or ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def code(language: str, text: str) -> str:
    """A block of code, whatever its lines are."""
    fence = "`" * (1 + max(2, *map(len, re.findall("`+", text)), 0))
    return f"{fence}{language}\n{text}\n{fence}"
