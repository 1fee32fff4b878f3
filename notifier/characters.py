"""Kinds of characters, each as ranges within the brackets of a regular expression."""

SURROGATES = r"\ud800-\udfff"

CONTROL = r"\x00-\x1f\x7f-\x9f"
CONTROL_EXCEPT_TAB_LF_CR = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"

# They reorder the letters that follow, which may be those of a mail client. Isolates (U+2066 to
# U+2069) are not among them: Unicode recommends those around an inserted name, and translation
# libraries such as Fluent write them.
BIDI_EMBEDDINGS_AND_OVERRIDES = r"\u202a-\u202e"

# Unicode's Default_Ignorable_Code_Point (DerivedCoreProperties.txt), which unicodedata lacks.
_IGNORABLE = (
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)

# Anchors of annotations, and the blank symbols of Braille, Egyptian, Khitan and music.
_BLANK = r"\u2800\ufff9-\ufffb\U00013441\U00013442\U00016fe4\U0001d159"

# Characters without a glyph, except white space.
INVISIBLE = _IGNORABLE + _BLANK
