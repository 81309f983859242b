"""Foreign text, such as the name of a class, on one line of a terminal, a figure or a card."""

import re
import unicodedata

# Characters that move the cursor, break the line or turn text around; joiners, which some languages need, are kept.
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def one_line(text: object, limit: int | None = None) -> str:
    r"""Text without line breaks and without control characters, which are written as ``\x1b``.

    Args:
        text: What is shown.
        limit: Longest text in characters; the middle of a longer one becomes "…", because ends tell names apart.
    """
    line = re.sub(r"\s+", " ", str(text)).strip()
    line = "".join(_visible(character) for character in line)
    if limit is None or len(line) <= limit:
        return line
    tail = (limit - 1) // 3
    return f"{line[: limit - 1 - tail]}…{line[len(line) - tail :]}"


def _visible(character: str) -> str:
    hidden = character in _TURNS or unicodedata.category(character) in ("Cc", "Cs")
    return character.encode("unicode_escape").decode() if hidden else character
