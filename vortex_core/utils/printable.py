"""Text that others wrote (prompts, paths, names, errors), made safe for a terminal or a plot."""

from __future__ import annotations

import re

# Control characters and escape sequences, marks that change the direction of text, and halves of characters.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """`text` on one line. What would steer a terminal is escaped as Python does it: `\\x1b`, `\\n`, `\\udce9`."""
    return _UNSAFE.sub(lambda found: repr(found[0])[1:-1], str(text))


def printable_lines(text: str) -> str:
    """`printable`, line by line."""
    return "\n".join(map(printable, text.split("\n")))
