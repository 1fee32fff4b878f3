"""The rule for email addresses: RFC 5321 and 6531 before the @, IDNA 2008 after it."""

import re
import unicodedata
from functools import lru_cache

import email_validator
import idna
from email_validator.syntax import validate_email_domain_name

from notifier.characters import INVISIBLE

# In octets of UTF-8: RFC 5321 section 4.5.3.1, and RFC 3696 with its erratum 1690.
MAX_ADDRESS = 254
MAX_LOCAL_PART = 64

MALFORMED = "must be an email address"
TOO_LONG = f"must be at most {MAX_ADDRESS} octets in UTF-8"
LOCAL_PART_TOO_LONG = f"must have at most {MAX_LOCAL_PART} octets in UTF-8 before the @"

# Domains that a worker remembers, valid or not.
_REMEMBERED = 4096

# RFC 5321's atext, and RFC 6531's characters beyond ASCII.
_ATEXT = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\x80-\U0010ffff-"
_DOT_ATOM = re.compile(rf"[{_ATEXT}]+(?:\.[{_ATEXT}]+)*")

# RFC 5321 allows any printable ASCII between quotes. A vendor that ignores the quotes would take
# `"a,b"@x.com` for two recipients, so only atoms, dots and single spaces are valid here.
_QUOTED = re.compile(rf'"[{_ATEXT}.]+(?: [{_ATEXT}.]+)*"')

# Numbers to inet_aton, which would take a domain that ends in one for an IP address.
_NUMBER = re.compile(r"0x[0-9a-f]*|\d+", re.IGNORECASE)

_INVISIBLE = re.compile(f"[{INVISIBLE}]")
_JOINERS = frozenset("\u200c\u200d")

# Special-use names such as .test and .local are ordinary here. The library documents this way.
email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()


class Addresses:
    """Checks email addresses. One per worker; may be used from any thread.

    Args:
        allow_local: whether address literals and domains of a single label are valid.
    """

    def __init__(self, *, allow_local: bool) -> None:
        self._allow_local = allow_local
        self._octets_of = lru_cache(_REMEMBERED)(self._measure)

    def problem(self, address: str) -> str | None:
        """Return what is wrong with `address`, without quoting it; None if it is valid."""
        if len(address) > MAX_ADDRESS:  # bounds the cost of the other checks
            return TOO_LONG
        local, _, domain = address.rpartition("@")
        if not _is_local_part(local) or not (octets := self._octets_of(domain)):
            return MALFORMED
        before = len(local.encode())
        if before > MAX_LOCAL_PART:
            return LOCAL_PART_TOO_LONG
        return TOO_LONG if before + 1 + octets > MAX_ADDRESS else None

    def _measure(self, domain: str) -> int:
        """Return the octets of `domain` in UTF-8 or in ASCII, whichever is more; 0 if invalid."""
        is_local = domain[:1] == "[" or "." not in domain
        last_label = domain.rpartition(".")[2]
        if (is_local and not self._allow_local) or _NUMBER.fullmatch(last_label):
            return 0
        try:
            if not (domain.isascii() or _is_mapped_by_case_only(domain)):
                return 0
            return max(len(domain.encode()), len(_in_ascii(domain, is_local=is_local)))
        except ValueError:
            return 0


def _in_ascii(domain: str, *, is_local: bool) -> str:
    """Return `domain` in ASCII.

    A name goes straight to the library's rule for names. Around it, `validate_email` would only
    split and judge an address.

    Raises:
        ValueError: `domain` is invalid.
    """
    if domain.startswith("["):
        return email_validator.validate_email(
            f"a@{domain}", allow_domain_literal=True, check_deliverability=False
        ).ascii_domain
    return validate_email_domain_name(domain, globally_deliverable=not is_local)["ascii_domain"]


def _is_mapped_by_case_only(domain: str) -> bool:
    """Return True if UTS 46, by which the library maps, changes only case and composition.

    The provider gets the domain unmapped, and IDNA 2008 knows no fullwidth or ignorable characters.
    UTS 46 lowers letters except Cherokee ones, which it raises.
    """
    mapped = idna.uts46_remap(domain, std3_rules=False, transitional=False)
    return _lowered(mapped) == _lowered(domain) and not any(map(_is_singleton, domain))


def _lowered(domain: str) -> str:
    """Lower each character by itself, as a final sigma has no capital of its own."""
    return unicodedata.normalize("NFC", "".join(map(str.lower, domain)))


def _is_singleton(character: str) -> bool:
    """Return True if NFC replaces `character` by another one, such as the Kelvin sign by a K."""
    composed = unicodedata.normalize("NFC", character)
    return len(composed) == 1 and composed != character


def _is_local_part(local: str) -> bool:
    grammar = _QUOTED if local[:1] == '"' else _DOT_ATOM
    if not grammar.fullmatch(local):
        return False
    return local.isascii() or _is_safe(local, grammar)


def _is_safe(local: str, grammar: re.Pattern[str]) -> bool:
    """Return True if `local` has no invisible character, and stays valid if a vendor normalizes it.

    NFKC turns U+FF0C into a comma, and even NFC turns U+037E into a semicolon.
    """
    shown = _without_joiners(local)
    starts_with_mark = unicodedata.category(shown.lstrip('"')[:1] or " ")[0] == "M"
    return (
        shown.isprintable()
        and not starts_with_mark
        and not _INVISIBLE.search(shown)
        and grammar.fullmatch(unicodedata.normalize("NFKC", shown)) is not None
    )


def _without_joiners(local: str) -> str:
    """Remove each ZWJ and ZWNJ that its script needs."""
    return "".join(
        character
        for position, character in enumerate(local)
        if character not in _JOINERS or not _is_needed(local, position)
    )


def _is_needed(local: str, position: int) -> bool:
    """Return True if the joiner at `position` follows a letter that it shapes (RFC 5892, A.1-2)."""
    try:
        return idna.valid_contextj(local, position)
    except ValueError:  # the character before it has no name
        return False
