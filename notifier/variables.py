"""The environment variables that are not settings.

Some have no effect, some are misspelt settings, and some are read by libraries.
"""

import re
from collections.abc import Collection, Mapping, MutableMapping
from difflib import get_close_matches
from ipaddress import IPv6Address
from typing import NamedTuple
from urllib.parse import unquote

# Variables of the Go service's cache and framework that have no counterpart here.
WITHOUT_EFFECT = ("GIN_MODE", "CACHE_NUM_COUNTERS", "CACHE_MAX_COST", "CACHE_BUFFER_ITEMS")

# Prefixes of our variables that other programs' variables have as well.
_COMMON_PREFIXES = {"APP_", "LOG_"}

# Variables that systemd sets for its services.
_SYSTEMD = {"CACHE_DIRECTORY", "NOTIFY_SOCKET"}

# How similar a variable without our prefixes is to ours (difflib's ratio) to count as misspelt.
_SIMILAR = 0.9

# Kubernetes sets these for each of the namespace's services, one named `db` or `web` included.
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)|_PORT_[0-9]+_(TCP|UDP|SCTP)")

# Without a scheme the port may not be empty: `http:` is no host.
_PROXY = re.compile(
    r"(?:(?P<scheme>[^:/?#@\s]*)://)?"
    r"(?:(?P<userinfo>[^][\\/?#\s]*)@)?"
    r"(?P<host>\[[^]%\s]*(?:%[A-Za-z0-9._~-]+)?]|[^][:/?#@\s]*)"
    r"(?::(?P<port>[^/?#@\s]*))?(?(scheme)|(?<!:))/?"
)
# RFC 6874's form of the % before the zone of an address.
_ENCODED_PERCENT = re.compile("%25(?!])")
_LABEL = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?")
_PORTS = range(1, 65_536)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class ProxyUrl(NamedTuple):
    """The parts of a proxy's URL.

    `host` is a name or an address, IPv6 in brackets. `port` is None if the URL has none.
    `credentials` is `USER:PASSWORD`, decoded, or empty.
    """

    is_tls: bool
    host: str
    port: int | None
    credentials: str

    @classmethod
    def of(cls, url: str) -> "ProxyUrl":
        """Parse the URL of a proxy, whose scheme may be missing.

        Raises:
            ValueError: `url` cannot be used; the message says why, and does not quote it.
        """
        parts = _PROXY.fullmatch(url)
        if not parts:
            raise ValueError("it is not the URL of a proxy")
        scheme, userinfo, host, port = parts.groups(default="")
        if parts["scheme"] is not None and scheme.lower() not in ("http", "https"):
            raise ValueError("its scheme is neither http nor https")
        if port and not (re.fullmatch("[0-9]{1,5}", port) and int(port) in _PORTS):
            raise ValueError("its port is not a number from 1 to 65535")
        if not _is_host(host):
            raise ValueError("it has no valid host")
        user, _, password = map(unquote, userinfo.partition(":"))
        if not _is_sendable(user + password):
            raise ValueError("its user or password cannot be sent")
        return cls(
            is_tls=scheme.lower() == "https",
            host=_ENCODED_PERCENT.sub("%", host),
            port=int(port) if port else None,
            credentials=f"{user}:{password}" if user or password else "",
        )


def unknown_variables(environ: Mapping[str, str], settings: Collection[str]) -> dict[str, str]:
    """Return the variables that are no settings but look like one, each with the nearest setting.

    A variable looks like a setting if it has a prefix of ours, or nearly a name of ours. An empty
    one counts as unset. Case does not matter: a setting in lower case is misspelt too.

    Args:
        settings: the names of the variables that are settings.
    """
    ours = tuple({f"{name.rpartition('_')[0]}_" for name in settings} - _COMMON_PREFIXES)
    unknown = {}
    for name in environ.keys() - {*settings, *WITHOUT_EFFECT, *_SYSTEMD}:
        if not environ[name].strip() or _is_service_link(name, environ):
            continue
        least = 0.0 if name.upper().startswith(ours) else _SIMILAR
        for nearest in get_close_matches(name.upper(), settings, 1, least):
            unknown[name] = nearest
    return dict(sorted(unknown.items()))


def _is_service_link(name: str, environ: Mapping[str, str]) -> bool:
    return bool(_SERVICE_LINK.search(name)) or f"{name.removesuffix('PORT')}SERVICE_HOST" in environ


def proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the URL of the proxy for `http` and for `https`, and the exceptions as `no`.

    Without a proxy the dict is empty. The variables are those that
    `urllib.request.getproxies_environment` reads, under its rules.
    """
    found = {scheme: url for scheme, (_, url) in _proxies(environ).items()}
    return found | {"no": _read(environ, "no_proxy")[1]} if found else {}


def proxy_problems(environ: Mapping[str, str]) -> list[str]:
    """Return a line for each variable in use that names no usable proxy.

    The lines never show the value: a password may stand where a port is expected.
    """
    urls = dict(_proxies(environ).values())
    problems = {name: _proxy_problem(url) for name, url in urls.items()}
    return [
        f"{name} cannot be used ({problem}): expected http://HOST:PORT or https://HOST:PORT, with "
        "USER:PASSWORD@ before the host if needed, and special characters in them as %XX"
        for name, problem in problems.items()
        if problem
    ]


def _proxies(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return the variable and the URL of the proxy for each scheme that has one."""
    if _read(environ, "no_proxy")[1] == "*":
        return {}
    either = _read(environ, "all_proxy")
    by_scheme = {
        scheme: own if (own := _read(environ, f"{scheme}_proxy"))[1] else either
        for scheme in ("http", "https")
    }
    return {scheme: (name, url) for scheme, (name, url) in by_scheme.items() if url}


def _read(environ: Mapping[str, str], variable: str) -> tuple[str, str]:
    """Return the name and the value of `variable` in the case that counts; lower case wins."""
    names = [name for name in environ if name.lower() == variable]
    if variable == "http_proxy" and "REQUEST_METHOD" in environ:
        # In a CGI script the other spellings may be a caller's header.
        names = [name for name in names if name.endswith("_proxy")]
    name = max(names, key=lambda name: (name == variable, name.endswith("_proxy")), default="")
    return name, environ.get(name, "").strip()


def _proxy_problem(url: str) -> str:
    """Return why `url` cannot be used as a proxy, or an empty string."""
    try:
        ProxyUrl.of(url)
    except ValueError as error:
        return str(error)
    return ""


def _is_host(text: str) -> bool:
    if not text.startswith("["):
        return _NAME.fullmatch(text) is not None
    try:
        IPv6Address(text[1:-1])
    except ValueError:
        return False
    return True


def _is_sendable(credentials: str) -> bool:
    """Return True if HTTP's basic authentication can carry `credentials` (RFC 7617)."""
    try:
        credentials.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return not _CONTROL.search(credentials)


def withdraw(environ: MutableMapping[str, str]) -> None:
    """Remove the variables by which libraries would bypass the settings.

    These are libpq's, of which some outrank explicit parameters (PGSERVICE), and the file to which
    some builds of OpenSSL write the keys of TLS connections.
    """
    for name in [*environ]:
        if name.startswith("PG") or name == "SSLKEYLOGFILE":
            environ.pop(name, None)
