"""The page `/metrics`: its contract, one process's counts, and the breakers of all workers."""

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from notifier import __version__, metrics
from notifier.breakers import CHANGES, Breaker, Breakers, Policy
from notifier.settings import Settings
from tests.fixtures import (
    Environment,
    Growth,
    MakeProvider,
    connect,
    create_database,
    insert_provider,
)
from tests.scripted_provider import Peer, Received, ScriptedProvider, answer
from tests.service import Service
from tests.timing import eventually

StartService = Callable[..., Service]
AddProvider = Callable[..., int]

SERVER = {"http_method", "http_route", "http_status_code"}
CLIENT = {"http_method", "http_host", "http_status_code", "error"}

# The names, types and labels on which other systems rely. The parser drops `_total`.
EXPORTED = {
    "http_server_requests": ("counter", SERVER),
    "http_server_duration_seconds": ("histogram", SERVER),
    "http_client_requests": ("counter", CLIENT),
    "http_client_duration_seconds": ("histogram", CLIENT),
    "circuit_breaker_state": ("gauge", {"host", "state"}),
    "circuit_breaker_state_changes": ("counter", {"host", "from_state", "to_state"}),
    "notifications": ("counter", {"recipient", "outcome"}),
    "notification_duration_seconds": ("histogram", {"recipient"}),
    "notification_places": ("gauge", set()),
    "log_lines_dropped": ("counter", set()),
    "notification_wait_seconds": ("histogram", set()),
    "notifications_refused": ("counter", set()),
    "notification_channel": ("counter", {"channel", "provider", "outcome"}),
    "notification_fallback": ("counter", {"channel"}),
    "preference_cache": ("counter", {"result"}),
    "preference_last_refresh_timestamp_seconds": ("gauge", set()),
    "preference_listener_connected": ("gauge", set()),
    "preference_listener_reconnects": ("counter", set()),
    "preference_notifications": ("counter", set()),
    "http_server_active_requests": ("gauge", set()),
    "worker_starts": ("counter", set()),
    "notifier_build_info": ("gauge", {"version", "python_version"}),
}

ENDPOINT, OTHER = "one.metrics.example:443", "other.metrics.example:443"  # used by no other test
ONE_FAILURE_OPENS = Policy(
    max_half_open=1, open_seconds=60.0, min_calls=1, failure_percent=1, window_seconds=60.0
)


def states() -> dict[str, tuple[str, float]]:
    """Return state and value of these tests' endpoints in this process's metrics."""
    families = text_string_to_metric_families(metrics.page().decode())
    (family,) = (family for family in families if family.name == "circuit_breaker_state")
    assert len(family.samples) == len({sample.labels["host"] for sample in family.samples})
    shown = {s.labels["host"]: (s.labels["state"], s.value) for s in family.samples}
    return {host: shown[host] for host in (ENDPOINT, OTHER) if host in shown}


def shown(service: Service, name: str) -> dict[tuple[str, ...], float]:
    """Return a metric's series by label values, in the order of the labels' names."""
    return {
        tuple(value for _, value in sorted(labels.items())): value
        for sample, labels, value in service.samples()
        if sample == name
    }


# --- the contract


@dataclass(frozen=True)
class Used:
    """A service with one worker after 5 buyers, a seller without push, and 3 wrong requests."""

    service: Service
    failing: str  # the endpoint that is tried first
    delivering: str


@pytest.fixture(scope="module")
def used(
    tmp_path_factory: pytest.TempPathFactory, server: Environment, _migrated: Environment
) -> Iterator[Used]:
    database = create_database(server, _migrated["DB_NAME"])
    with ScriptedProvider(answer(503)) as failing, ScriptedProvider() as delivering:
        insert_provider(database, failing.url, priority=1, name="email 1")
        insert_provider(database, delivering.url, priority=2, name="email 2")
        service = Service(tmp_path_factory.mktemp("used"), database)
        try:
            service.wait_until_ready().wait_until_listening()
            _use(service)
            yield Used(service, failing.endpoint, delivering.endpoint)
        finally:
            service.stop()


def _use(service: Service) -> None:
    for _ in range(5):
        assert service.notify("buyer").status_code == 200
    assert service.notify("seller").status_code == 500
    assert service.notify("nobody").status_code == 422
    assert requests.get(f"{service.url}/no/such/path", timeout=5).status_code == 404
    assert requests.request("GRAB", f"{service.url}/healthz", timeout=5).status_code == 405


def test_names_types_and_labels_are_those_of_the_contract(used: Used) -> None:
    page = requests.get(f"{used.service.url}/metrics", timeout=5)
    assert page.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {}
    for family in text_string_to_metric_families(page.text):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[family.name] = (family.type, labels)
        assert family.documentation
    assert found == EXPORTED
    assert list(found) == sorted(found)  # for human readers


def test_requests_are_counted_by_route_and_calls_by_endpoint(used: Used) -> None:
    route = "/api/v1.0/recipient/<recipient>/notify"
    answered = shown(used.service, "http_server_requests_total")
    assert {key: n for key, n in answered.items() if key[1] != "/metrics"} == {
        ("POST", route, "200"): 5,
        ("POST", route, "500"): 1,
        ("POST", route, "422"): 1,
        ("GET", "unmatched", "404"): 1,
        ("_OTHER", "unmatched", "405"): 1,
    }
    assert used.service.metric("http_server_duration_seconds_count", http_route=route) == 7
    assert shown(used.service, "http_client_requests_total") == {
        ("", used.failing, "POST", "503"): 3,  # then its breaker opened
        ("", used.delivering, "POST", "200"): 6,
    }
    assert used.service.metric("http_client_duration_seconds_count", http_host=used.failing) == 3
    assert shown(used.service, "circuit_breaker_state") == {
        (used.failing, "open"): 1,
        (used.delivering, "closed"): 0,
    }
    changes = shown(used.service, "circuit_breaker_state_changes_total")
    assert {key: n for key, n in changes.items() if n} == {("closed", used.failing, "open"): 1}
    assert len(changes) == 2 * len(CHANGES)  # the others exist at 0


def test_notifications_channels_and_look_ups_are_counted_by_outcome(used: Used) -> None:
    assert {key: n for key, n in shown(used.service, "notifications_total").items() if n} == {
        ("delivered", "buyer"): 5,
        ("no_provider", "seller"): 1,
    }
    channels = shown(used.service, "notification_channel_total")
    assert {key: n for key, n in channels.items() if n} == {
        ("Email", "delivered", "email 2"): 6,
        ("PushNotification", "no_provider", ""): 1,
    }
    assert used.service.metric("notification_duration_seconds_count", recipient="buyer") == 5
    assert used.service.metric("notification_fallback_total", channel="Email") == 6
    assert shown(used.service, "preference_cache_total") == {
        ("hit",): 7,
        ("miss",): 0,
        ("stale",): 0,
        ("error",): 0,
    }


def test_the_build_info_appears_once_however_many_workers_there_are(
    start_service: StartService,
) -> None:
    service = start_service(WEB_CONCURRENCY="2")
    expected = {(platform.python_version(), __version__): 1}
    assert shown(service, "notifier_build_info") == expected


def test_durations_are_in_seconds_and_each_includes_the_one_that_it_waits_for(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider
) -> None:
    def late(peer: Peer, received: Received) -> None:
        peer.pause(0.3)
        answer()(peer, received)

    add_provider(make_provider(late).url)
    service = start_service(WEB_CONCURRENCY="1")
    service.notify()
    call = service.metric("http_client_duration_seconds_sum")
    notification = service.metric("notification_duration_seconds_sum")
    request = service.metric("http_server_duration_seconds_sum", http_method="POST")
    assert 0.3 <= call <= notification <= request < 30


def test_counters_are_exported_at_zero_before_they_count(start_service: StartService) -> None:
    """Prometheus sees no increase in a series that starts with its first count."""
    service = start_service()
    zeros = {
        "notifications_total": 6,  # recipients x outcomes
        "notification_channel_total": 4,  # channels x outcomes without a provider
        "notification_fallback_total": 2,
        "preference_cache_total": 4,
    }
    assert {name: len(shown(service, name)) for name in zeros} == zeros
    assert {service.metric(name) for name in zeros} == {0}


def test_the_buckets_range_from_a_millisecond_to_beyond_the_deadline() -> None:
    deadline = Settings.__dataclass_fields__["http_client_timeout"].default * 3
    assert metrics.BUCKETS[0] == 0.001
    assert {5.0, deadline} < set(metrics.BUCKETS)
    assert metrics.BUCKETS[-1] > deadline  # a request that its deadline ends takes a little longer
    assert list(metrics.BUCKETS) == sorted(set(metrics.BUCKETS))


def test_instruments_are_cached_by_their_labels() -> None:
    assert metrics.server_requests("POST", "/", 200) is metrics.server_requests("POST", "/", 200)
    assert metrics.client_calls(ENDPOINT, None, "dns") is metrics.client_calls(
        ENDPOINT, None, "dns"
    )
    assert metrics.notifications("buyer", "failed") is metrics.notifications("buyer", "failed")
    assert metrics.channel_notifications("Email", "", "failed") is metrics.channel_notifications(
        "Email", "", "failed"
    )
    assert metrics.fallbacks("Email") is metrics.fallbacks("Email")


@pytest.mark.parametrize(
    ("status", "label"), [(None, ""), (200, "200"), (599, "599"), (600, "_OTHER"), (999, "_OTHER")]
)
def test_a_provider_cannot_create_labels_with_unknown_statuses(
    status: int | None, label: str, growth: Growth
) -> None:
    metrics.client_calls(ENDPOINT, status).record(0.1)
    assert growth("http_client_requests_total") == {("POST", ENDPOINT, label, ""): 1}


# --- breakers


@pytest.fixture
def breakers() -> Iterator[Breakers]:
    made = Breakers(ONE_FAILURE_OPENS)
    yield made
    made.configure(set())


def fail(breaker: Breaker) -> None:
    with breaker.calling() as call:
        call.record(failed=True)


def test_a_breaker_is_shown_only_while_its_endpoint_is_configured(breakers: Breakers) -> None:
    breakers.configure({ENDPOINT, OTHER})
    assert states() == {ENDPOINT: ("closed", 0), OTHER: ("closed", 0)}
    breakers.configure({ENDPOINT})
    assert states() == {ENDPOINT: ("closed", 0)}
    breakers.configure({OTHER})
    assert states() == {OTHER: ("closed", 0)}


def test_a_breaker_that_stays_configured_keeps_its_state(breakers: Breakers) -> None:
    breakers.configure({ENDPOINT})
    fail(breakers.of(ENDPOINT))
    breakers.configure({ENDPOINT, OTHER})
    assert states() == {ENDPOINT: ("open", 1), OTHER: ("closed", 0)}


def test_an_endpoint_that_is_configured_again_gets_a_new_breaker(breakers: Breakers) -> None:
    breakers.configure({ENDPOINT})
    fail(breakers.of(ENDPOINT))
    breakers.configure(set())
    breakers.configure({ENDPOINT})
    assert states() == {ENDPOINT: ("closed", 0)}


def test_a_call_that_outlives_its_endpoints_configuration_shows_nothing(breakers: Breakers) -> None:
    breakers.configure({ENDPOINT})
    with breakers.of(ENDPOINT).calling() as call:
        breakers.configure(set())
        call.record(failed=True)
    assert states() == {}


def test_a_call_that_outlives_its_endpoints_configuration_does_not_change_the_next(
    breakers: Breakers,
) -> None:
    breakers.configure({ENDPOINT})
    with breakers.of(ENDPOINT).calling() as call:
        breakers.configure(set())
        breakers.configure({ENDPOINT})
        call.record(failed=True)
    assert states() == {ENDPOINT: ("closed", 0)}


def test_a_request_with_an_older_configuration_does_not_show_its_endpoint_again(
    breakers: Breakers,
) -> None:
    breakers.configure({ENDPOINT})
    breakers.configure(set())
    fail(breakers.of(ENDPOINT))
    assert states() == {}


class Clock:
    """A clock that stops at the real time of its creation until a test sets it."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


def test_each_state_has_its_name_and_number_and_each_change_its_count(growth: Growth) -> None:
    clock = Clock()
    breaker = Breaker(ENDPOINT, ONE_FAILURE_OPENS, clock)
    breaker.configure(configured=True)
    fail(breaker)
    assert states()[ENDPOINT] == ("open", 1)

    clock.now -= 60  # the metric uses the real clock
    fail_long_ago = Breaker(ENDPOINT, ONE_FAILURE_OPENS, clock)
    fail_long_ago.configure(configured=True)
    fail(fail_long_ago)
    assert states()[ENDPOINT] == ("half-open", 2)  # without any call since

    clock.now += 60
    with fail_long_ago.calling() as call:
        assert states()[ENDPOINT] == ("half-open", 2)
        call.record(failed=False)
    assert states()[ENDPOINT] == ("closed", 0)
    assert growth("circuit_breaker_state_changes_total") == {
        (ENDPOINT, "closed", "open"): 2,
        (ENDPOINT, "open", "half-open"): 1,
        (ENDPOINT, "half-open", "closed"): 1,
    }
    breaker.configure(configured=False)


def test_the_worst_of_the_workers_states_is_shown_and_half_open_needs_no_traffic(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider
) -> None:
    provider, other = make_provider(), make_provider()
    add_provider(provider.url)
    add_provider(other.url, priority=1)
    service = start_service(
        WEB_CONCURRENCY="2",
        CIRCUIT_BREAKER_MIN_REQUESTS_BEFORE_TRIP="1",
        CIRCUIT_BREAKER_FAILURE_THRESHOLD_PERCENT="1",
        CIRCUIT_BREAKER_OPEN_STATE_TIMEOUT="2s",
        CIRCUIT_BREAKER_MAX_HALF_OPEN_REQUESTS="1",
    )

    service.wait_until_listening()  # so each worker has a breaker for the endpoint
    provider.script = answer(503)
    with requests.Session() as one_worker:  # it reuses its connection
        service.notify(session=one_worker)
        assert service.metric("circuit_breaker_state_changes_total") == 1
        state = {(provider.endpoint, "open"): 1, (other.endpoint, "closed"): 0}
        assert shown(service, "circuit_breaker_state") == state

        provider.script = answer()
        half_open = {(provider.endpoint, "half-open"): 2, (other.endpoint, "closed"): 0}
        eventually(lambda: shown(service, "circuit_breaker_state") == half_open)
        assert service.metric("circuit_breaker_state_changes_total") == 1

        assert service.notify(session=one_worker).status_code == 200
        closed = {(provider.endpoint, "closed"): 0, (other.endpoint, "closed"): 0}
        assert shown(service, "circuit_breaker_state") == closed


def test_an_endpoint_that_is_no_longer_configured_disappears(
    start_service: StartService,
    make_provider: MakeProvider,
    add_provider: AddProvider,
    database: dict[str, str],
) -> None:
    old, new = make_provider(answer(503)), make_provider()
    gone = add_provider(old.url)
    service = start_service(WEB_CONCURRENCY="2").wait_until_listening()
    service.notify()
    assert shown(service, "circuit_breaker_state") == {(old.endpoint, "closed"): 0}
    add_provider(new.url)
    with connect(database) as connection:
        connection.execute(
            "UPDATE notification_preferences SET deleted_at = now() WHERE id = %s", (gone,)
        )

    only_the_new_one = {(new.endpoint, "closed"): 0}
    eventually(lambda: shown(service, "circuit_breaker_state") == only_the_new_one)


def test_listener_metrics_cover_all_workers(
    start_service: StartService, add_provider: AddProvider
) -> None:
    service = start_service(WEB_CONCURRENCY="3").wait_until_listening()
    assert service.metric("preference_listener_reconnects_total") == 0
    before = time.time()
    add_provider("http://a/")
    eventually(lambda: service.metric("preference_last_refresh_timestamp_seconds") >= before)
    assert service.metric("preference_notifications_total") == 3


def test_without_invalidation_no_worker_listens(start_service: StartService) -> None:
    service = start_service(CACHE_INVALIDATION="off")
    eventually(lambda: service.metric("preference_last_refresh_timestamp_seconds") > 0)
    assert service.metric("preference_listener_connected") == 0
