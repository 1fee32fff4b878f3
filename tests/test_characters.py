"""The ranges of characters, against Python's data of Unicode."""

import re
import sys
import unicodedata

import pytest

from notifier.characters import CONTROL, CONTROL_EXCEPT_TAB_LF_CR, INVISIBLE, SURROGATES

EVERYTHING = "".join(map(chr, range(sys.maxunicode + 1)))

# Format characters that Unicode wants shown.
SHOWN = {
    *map(chr, [*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD]),
    *map(chr, range(0x13430, 0x13440)),
}

# Characters of other categories without a glyph: the grapheme joiner, vowels and variation
# selectors, and blank symbols.
OTHERS = {
    *map(chr, [0x34F, 0x17B4, 0x17B5, *range(0x180B, 0x1810), *range(0xFE00, 0xFE10), 0x2800]),
    *map(chr, [0x13441, 0x13442, 0x16FE4, 0x1D159, *range(0xE0100, 0xE01F0)]),
}


CATEGORIES: dict[str, set[str]] = {}
for character in EVERYTHING:
    CATEGORIES.setdefault(unicodedata.category(character), set()).add(character)


def found(ranges: str) -> set[str]:
    return {*re.findall(f"[{ranges}]", EVERYTHING)}


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        (CONTROL, CATEGORIES["Cc"]),
        (CONTROL_EXCEPT_TAB_LF_CR, CATEGORIES["Cc"] - {"\t", "\n", "\r"}),
        (SURROGATES, CATEGORIES["Cs"]),
    ],
    ids=["control", "control except tab, LF, CR", "surrogates"],
)
def test_the_ranges_are_a_category_of_unicode(ranges: str, expected: set[str]) -> None:
    assert found(ranges) == expected


def test_invisible_are_format_characters_fillers_and_blank_symbols() -> None:
    fillers = {c for c in CATEGORIES["Lo"] if unicodedata.name(c, "").endswith("FILLER")}
    expected = (CATEGORIES["Cf"] - SHOWN) | fillers | OTHERS
    assert found(INVISIBLE) - CATEGORIES["Cn"] == expected - CATEGORIES["Cn"]
