"""The values that travel through the service, and the name of a provider's endpoint."""

from dataclasses import FrozenInstanceError

import pytest

from notifier.models import Channel, Message, Provider, Recipient, endpoint_of

SECRET = "s3cr3t-key"


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://mail.example.com/send", "mail.example.com:80"),
        ("https://mail.example.com/send", "mail.example.com:443"),
        ("HTTPS://Mail.EXAMPLE.Com/Send", "mail.example.com:443"),
        ("http://mail.example.com:8080", "mail.example.com:8080"),
        ("http://mail.example.com:443/", "mail.example.com:443"),
        ("http://mail.example.com:/", "mail.example.com:80"),
        ("http://mail.example.com:0080/", "mail.example.com:80"),
        ("http://mail.example.com:65535/", "mail.example.com:65535"),
        ("http://mail.example.com?to=a#b", "mail.example.com:80"),
        ("http://localhost:1", "localhost:1"),
        ("http://192.0.2.7/", "192.0.2.7:80"),
        ("http://[2001:DB8::1]/", "[2001:db8::1]:80"),
        ("https://[::1]:8443/send", "[::1]:8443"),
        ("http://user:pass@mail.example.com/", "mail.example.com:80"),
        ("http://user:p@ss@mail.example.com:81/", "mail.example.com:81"),
        ("https://b\u00fccher.example/", "xn--bcher-kva.example:443"),
        ("https://xn--bcher-kva.example/", "xn--bcher-kva.example:443"),
    ],
)
def test_an_endpoint_is_written_in_lower_case_with_its_port(url: str, endpoint: str) -> None:
    assert endpoint_of(url) == endpoint


@pytest.mark.parametrize(
    "url",
    [
        "",
        " ",
        "mail.example.com",
        "mail.example.com/send",
        "mail.example.com:8080/send",
        "localhost:8080",
        "//mail.example.com/send",
        "/send",
        "http",
        "http:",
        "http://",
        "http:///send",
        "http:mail.example.com",
        "http:/mail.example.com",
        "http://:8080/",
        "http://user@:8080/",
        "ftp://mail.example.com/",
        "file:///etc/passwd",
        "mailto:someone@example.com",
        "unix:///run/mail.sock",
        "http://mail.example.com:0/",
        "http://mail.example.com:65536/",
        "http://mail.example.com:70000/",
        "http://mail.example.com:-1/",
        "http://mail.example.com:http/",
        "http://mail.example.com:\uff18\uff10/",
        "http://mail example.com/",
        "http://mail.example.com /",
        " http://mail.example.com/",
        "http://mail\n.example.com/",
        "http://mail\x00.example.com/",
        "http://[::1/",
        "http://[mail]/",
        "http://\u2603.example/",
        "http://\u00fc" + "a" * 64 + ".example/",
        "http://\udc80.example/",
    ],
    ids=ascii,
)
def test_a_url_that_cannot_be_called_has_no_endpoint(url: str) -> None:
    assert endpoint_of(url) is None


def test_a_provider_is_made_from_a_row() -> None:
    row = (7, "PushNotification", "pusher", "https://Push.example.com/v1", SECRET)
    assert Provider.from_row(row) == Provider(
        id=7,
        channel=Channel.PUSH,
        name="pusher",
        url="https://Push.example.com/v1",
        endpoint="push.example.com:443",
        secret_key=SECRET,
    )


def test_white_space_around_a_url_is_removed() -> None:
    provider = Provider.from_row((7, "Email", "p", "\t https://mail.example.com/v1 \r\n", SECRET))
    assert provider.url == "https://mail.example.com/v1"
    assert provider.endpoint == "mail.example.com:443"


@pytest.mark.parametrize("secret_key", [None, ""])
def test_a_provider_without_a_secret_has_an_empty_one(secret_key: str | None) -> None:
    row = (7, "Email", "p", "https://mail.example.com/", secret_key)
    assert Provider.from_row(row).secret_key == ""


def test_a_row_whose_url_cannot_be_called_is_still_a_provider() -> None:
    provider = Provider.from_row((7, "Email", "p", "mail.example.com", SECRET))
    assert provider.endpoint is None
    assert provider.url == "mail.example.com"


def test_a_row_of_an_unknown_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="provider_type: unknown channel"):
        Provider.from_row((7, "Pigeon", "p", "https://mail.example.com/", SECRET))


def test_the_repr_of_a_provider_hides_its_secret_and_its_url() -> None:
    url = "https://user:pass@mail.example.com/hook/t0ken"
    shown = repr(Provider.from_row((7, "Email", "mailer", url, SECRET)))
    assert "mailer" in shown
    assert "mail.example.com:443" in shown
    for hidden in (SECRET, "pass", "t0ken", "hook"):
        assert hidden not in shown


def test_the_repr_of_a_message_hides_all_of_it() -> None:
    assert repr(Message("buyer@example.com", "Your order", "It is on its way")) == "Message()"


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (Message("buyer@example.com", "t", "m"), "title"),
        (Provider.from_row((7, "Email", "p", "https://mail.example.com/", SECRET)), "secret_key"),
    ],
    ids=["message", "provider"],
)
def test_values_are_frozen(value: object, field: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(value, field, "other")


def test_recipients_and_channels_are_those_of_the_contract_and_the_schema() -> None:
    assert [*Recipient] == ["buyer", "seller"]
    assert [*Channel] == ["Email", "PushNotification"]
