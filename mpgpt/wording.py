"""Words for numbers in sentences that people read.

Knows: plurals and units.
Must not know: what is counted.
"""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as 1 rank and 2 ranks."""
    return f"{number} {noun}{'s' * (number != 1)}"


def gigabytes(count: float) -> str:
    """Bytes in powers of ten, as memory is sold."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
