"""The variables that libraries read: proxies are checked, and others cannot bypass the settings."""

import os
import random
from base64 import b64decode
from urllib.request import getproxies_environment

import pytest

from notifier.settings import Settings, SettingsError
from notifier.variables import proxies, proxy_problems, withdraw
from notifier.wire.proxies import Proxies
from tests.test_settings import REQUIRED

SECRET = "hunter2"
GOOD = "http://proxy.corp:3128"

USABLE = [
    GOOD,
    "https://proxy.corp:3128",
    "HTTP://PROXY.CORP:3128/",
    "http://proxy.corp",
    "http://proxy.corp.:3128",
    "http://proxy.corp:",
    "proxy.corp:3128",
    "proxy_1",
    "10.0.0.1:3128",
    "http://[2001:db8::1]:3128",
    "[::1]:3128",
    "http://[fe80::1%25eth0]:3128",
    "http://user:p%40ss@proxy.corp:3128",
    "http://user:p@ss@proxy.corp",
    "http://user:@proxy.corp",
    "http://user@proxy.corp",
    "user:pass@proxy.corp:3128",
    "http://us\xe9r:p%C3%A4ss@proxy.corp",
    f"  {GOOD}\r",
]

SCHEME, PORT = "its scheme is neither http nor https", "its port is not a number from 1 to 65535"
HOST, WHOLE = "it has no valid host", "it is not the URL of a proxy"
CREDENTIALS = "its user or password cannot be sent"

UNUSABLE = {
    "socks5://proxy.corp:1080": SCHEME,
    "socks5h://proxy.corp": SCHEME,
    "socks4://proxy.corp": SCHEME,
    "ftp://proxy.corp:21": SCHEME,
    "pac+http://proxy.corp/": SCHEME,
    "://proxy.corp": SCHEME,
    "http://proxy.corp:port": PORT,
    "http://proxy.corp:0": PORT,
    "http://proxy.corp:65536": PORT,
    "http://proxy.corp:99999999": PORT,
    "http://proxy.corp:-1": PORT,
    "http://proxy.corp:+80": PORT,
    "http://proxy.corp:\uff18\uff10": PORT,
    "http:proxy.corp": PORT,
    f"http://user:{SECRET}": PORT,
    "http:": WHOLE,
    "http:/": WHOLE,
    "proxy.corp:": WHOLE,
    f"http://user:{SECRET}[x]@proxy.corp": WHOLE,
    f"http://user:{SECRET}\\x@proxy.corp": WHOLE,
    f"http://[user:{SECRET}@proxy.corp:1": WHOLE,
    f"http://user]:{SECRET}@proxy.corp:1": WHOLE,
    "http://[fe80::1%/]:3128": WHOLE,
    "http://": HOST,
    "http:///": HOST,
    "http://:3128": HOST,
    ":3128": HOST,
    f"http://user:{SECRET}@": HOST,
    f"http://user:{SECRET}@:3128": HOST,
    "http://.": HOST,
    "http://proxy..corp": HOST,
    "http://-proxy.corp": HOST,
    "http://" + 64 * "a": HOST,
    "http://[proxy]:3128": HOST,
    "http://[::1": WHOLE,
    "::1": PORT,
    "http://*.corp:3128": HOST,
    "'http://proxy.corp:3128'": SCHEME,
    "http://pr%6fxy": HOST,
    "http://pr\xf6xy:3128": HOST,
    "http://proxy.corp:3128/proxy.pac": WHOLE,
    "http://proxy.corp?x": WHOLE,
    "http://proxy.corp#x": WHOLE,
    "http://proxy.corp:3128,http://other:3128": WHOLE,
    "http://a b": WHOLE,
    "http:// proxy.corp": WHOLE,
    "http://proxy.corp:31 28": WHOLE,
    "http://proxy.corp\nX: y": WHOLE,
    "http://proxy\x01.corp": HOST,
    "/proxy": WHOLE,
    f"http://user:{SECRET}/x@proxy.corp": WHOLE,
    f"http://user:{SECRET}#x@proxy.corp": WHOLE,
    f"http://user:{SECRET} x@proxy.corp": WHOLE,
    f"http://user:{SECRET}\u65e5@proxy.corp": CREDENTIALS,
    f"http://user:{SECRET}%E6%97%A5@proxy.corp": CREDENTIALS,
    f"http://user:{SECRET}%ff@proxy.corp": CREDENTIALS,
    f"http://user:{SECRET}\udcff@proxy.corp": CREDENTIALS,
    f"http://user:{SECRET}\x01@proxy.corp": CREDENTIALS,
    f"http://us%0Aer:{SECRET}@proxy.corp": CREDENTIALS,
}

NAMES = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"]


def problem(**variables: str) -> str:
    """Return the message with which these variables stop the start; empty if they don't."""
    try:
        Settings.from_env(REQUIRED | variables)
    except SettingsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("url", USABLE)
def test_a_usable_proxy_is_accepted_and_can_be_used(url: str) -> None:
    given = {"HTTPS_PROXY": url}
    assert problem(**given) == ""
    assert Proxies(proxies(given)).of("https://mail.example.com/")


@pytest.mark.parametrize("url", UNUSABLE)
def test_an_unusable_proxy_stops_the_start_with_one_line_that_shows_no_password(url: str) -> None:
    message = problem(HTTPS_PROXY=url)
    assert message.startswith(f"HTTPS_PROXY cannot be used ({UNUSABLE[url]}): expected http://HOST")
    assert SECRET not in message
    assert message.splitlines() == [message]


PIECES = [
    *["http:", "https:", "//", "/", ":", "@", "[", "]", "\\", "?", "#", "%", "%40", "%ff", "%25"],
    *["u", "p", "h.corp", "10.0.0.1", "[::1]", "[fe80::1%eth0]", "3128", "0", "99999", "-", "."],
    *[
        "\t",
        "\x00",
        "\x85",
        "\xa0",
        "\xbd",
        "\xe9",
        "\u2100",
        "\uff0f",
        "\uff18",
        "\udcff",
        "http://",
    ],
]


def test_each_value_stops_the_start_or_can_be_used() -> None:
    chance = random.Random(1_000_003)
    usable = 0
    for _ in range(40_000):
        url = "".join(chance.choices(PIECES, k=chance.randint(1, 7)))
        url = chance.choice(["", "http://", "http://u:p"]) + url
        given = {"HTTPS_PROXY": url + chance.choice(["", "@h.corp:1"])}
        if proxies(given) and not proxy_problems(given):
            proxy = Proxies(proxies(given)).of("https://mail.example.com/")
            assert proxy is not None, given
            assert proxy.origin.port in range(1, 65_536), given
            assert proxy.origin.name.encode("idna"), given
            assert proxy.credentials.splitlines(keepends=True) in ([], [proxy.credentials])
            usable += 1
    assert usable > 1000


@pytest.mark.parametrize(
    ("userinfo", "sent"),
    {
        "user:pass@": "user:pass",
        "us%40er:p%3Ass@": "us@er:p:ss",
        "user:p@ss@": "user:p@ss",
        "user@": "user:",
        "\xe9:%C3%A4@": "\xe9:\xe4",
        ":@": "",
        "@": "",
        "": "",
    }.items(),
)
def test_the_credentials_are_sent_decoded(userinfo: str, sent: str) -> None:
    proxy = Proxies({"https": f"http://{userinfo}proxy.corp"}).of("https://mail.example.com/")
    assert proxy is not None
    assert proxy.origin == (False, "proxy.corp", 80)
    assert b64decode(proxy.credentials.partition("Basic ")[2]).decode("latin-1") == sent


@pytest.mark.parametrize("zone", ["%25eth0", "%eth0"])
def test_the_zone_of_an_address_is_decoded(zone: str) -> None:
    proxy = Proxies({"https": f"https://[fe80::1{zone}]"}).of("https://mail.example.com/")
    assert proxy is not None
    assert proxy.origin == (True, "[fe80::1%eth0]", 443)
    assert proxy.origin.name == "fe80::1%eth0"


@pytest.mark.parametrize("name", NAMES)
def test_the_line_names_each_variable_once_and_other_wrong_settings_too(name: str) -> None:
    message = problem(**{name: "socks5://proxy.corp", "WEB_THREADS": "0"})
    assert message.startswith('WEB_THREADS is "0"')
    assert message.count(f"; {name} cannot be used") == 1


@pytest.mark.parametrize(
    "variables",
    [
        {"ALL_PROXY": "socks5://a", "HTTP_PROXY": GOOD, "https_proxy": GOOD},
        {"HTTP_PROXY": "socks5://a", "http_proxy": GOOD},
        {"HTTP_PROXY": "socks5://a", "http_proxy": ""},
        {"HTTP_PROXY": "socks5://a", "REQUEST_METHOD": "GET"},
        {"HTTP_PROXY": "socks5://a", "NO_PROXY": "*"},
        {"HTTP_PROXY": " "},
        {"FTP_PROXY": "socks5://a", "RSYNC_PROXY": "a b", "_PROXY": "x"},
        {"HTTP_PROXY": GOOD, "NO_PROXY": "10.0.0.0/99, a b,,[::1"},
    ],
    ids=str,
)
def test_a_variable_that_is_not_used_is_not_checked(variables: dict[str, str]) -> None:
    assert problem(**variables) == ""


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"NO_PROXY": "a"},
        {"HTTP_PROXY": "http://a", "http_proxy": "http://b", "NO_PROXY": "c", "no_proxy": "d"},
        {"http_proxy": "http://b", "HTTP_PROXY": "http://a"},
        {"HTTP_PROXY": "http://a", "http_proxy": ""},
        {"HTTP_PROXY": "http://a", "REQUEST_METHOD": "GET"},
        {"http_proxy": "http://a", "REQUEST_METHOD": "GET"},
        {"HTTPS_PROXY": "http://a", "REQUEST_METHOD": "GET"},
        {"Https_Proxy": "http://a"},
        {"HTTP_PROXY": "http://a", "ALL_PROXY": "http://b"},
        {"all_proxy": "http://b", "NO_PROXY": "mail.example.com"},
    ],
    ids=str,
)
def test_proxies_are_chosen_as_urllib_reads_them(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ours, theirs = Proxies(proxies(os.environ)), Proxies(getproxies_environment())
    for url in ("http://mail.example.com/", "https://mail.example.com/", "http://a/", "http://d/"):
        assert ours.of(url) == theirs.of(url)


def test_only_variables_that_bypass_the_settings_are_withdrawn() -> None:
    kept = dict.fromkeys(["HOME", "DB_HOST", "HTTP_PROXY", "SSL_CERT_FILE", "APP_PGHOST"], "x")
    environ = kept | dict.fromkeys(["PGHOST", "PGSERVICE", "PGOPTIONS", "SSLKEYLOGFILE"], "x")
    withdraw(environ)
    assert environ == kept
