"""The invariants, which must hold whatever fails; most are checked request by request."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import NamedTuple

from tools.chaos.evidence import ADMITTED, FAILED, UNREAD, Evidence, Reply, Size

CHANNELS = {"buyer": {"Email"}, "seller": {"Email", "PushNotification"}}
CODES: dict[int, str] = {
    HTTPStatus.INTERNAL_SERVER_ERROR: "E102",
    HTTPStatus.SERVICE_UNAVAILABLE: "E106",
}

# Seconds between an event in a worker and its log line: the worker's threads take turns.
LOGGED_WITHIN = 0.25
CUT_WITHIN = 2.0  # seconds between a kill and the end of the process's connections

# The reasons of failed attempts whose provider may have accepted, but too late.
TOO_LATE = frozenset({"timeout", "deadline"})

# How many times `threads` a worker may add, in pools for requests, for waiting requests and for
# second channels.
POOLS = 4
MEMORY = 1.5  # the memory that a worker may have, as a multiple of that before the chaos


class Violation(NamedTuple):
    """The violation of an invariant, and the id of its request if it concerns a single one."""

    problem: str
    request_id: str | None = None


def replies_match_deliveries(seen: Evidence) -> Iterator[Violation]:
    """A reply is 200 if, and only if, exactly one provider of each channel accepted in time."""
    late = {
        (line.request_id, line.host) for line in seen.lines_with(FAILED) if line.reason in TOO_LATE
    }
    accepted = seen.accepted()
    for reply in seen.replies:
        in_time = [
            delivery.channel
            for delivery in accepted.get(reply.request_id, [])
            if (reply.request_id, delivery.host) not in late
        ]
        expected = Counter(CHANNELS[reply.recipient])
        matches = Counter(in_time) == expected
        if _may_be_lost(reply.ended, seen.kills):  # perhaps the line about a late acceptance
            matches = reply.status == HTTPStatus.OK and Counter(in_time) >= expected
        if reply.status and (reply.status == HTTPStatus.OK) != matches:
            problem = f"{reply.status}, but accepted in time on {sorted(in_time)}"
            yield Violation(problem, reply.request_id)


def replied_in_time(seen: Evidence) -> Iterator[Violation]:
    """Every reply came within the deadline, and every error in the error envelope."""
    most = seen.limits.deadline + seen.limits.margin
    for reply in seen.replies:
        if reply.cut:
            continue
        if not reply.status or reply.seconds > most:
            yield Violation(
                f"{reply.status or 'no reply'} after {reply.seconds:.2f} s", reply.request_id
            )
        elif reply.headers.get("X-Request-Id") != reply.request_id:
            yield Violation("the reply has another request's id", reply.request_id)
        elif reply.status != HTTPStatus.OK and not _has_envelope(reply):
            yield Violation(f"{reply.status} with the body {reply.body}", reply.request_id)


def _has_envelope(reply: Reply) -> bool:
    match reply.body:
        case {"error": {"code": str(code), "message": str(), **more}, **others}:
            promised = "Retry-After" in reply.headers or code != "E106"
            return code == CODES.get(reply.status) and promised and not more and not others
    return False


def only_kills_cut(seen: Evidence) -> Iterator[Violation]:
    """Connections break only when a worker is killed, and at most as many as it serves."""
    cut = [reply for reply in seen.replies if reply.cut]
    for reply in cut:
        if not any(0 <= reply.ended - kill <= CUT_WITHIN for kill in seen.kills):
            yield Violation("cut although no worker had been killed", reply.request_id)
    if len(cut) > (most := seen.limits.threads * len(seen.kills)):
        yield Violation(f"{len(cut)} connections were cut; kills explain at most {most}")


def open_breakers_refuse(seen: Evidence) -> Iterator[Violation]:
    """Every delivery was admitted by the worker's breaker, while that was not open."""
    admitted = {(line.host, line.request_id): line for line in seen.lines_with(ADMITTED)}
    times_open = _times_open(seen)
    for delivery in seen.deliveries:
        line = admitted.get((delivery.host, delivery.request_id))
        if not line and _may_be_lost(delivery.received, seen.kills):
            continue
        if not line or line.at > delivery.received + LOGGED_WITHIN:
            yield Violation(f"no breaker had admitted {delivery.host}", delivery.request_id)
            continue
        for began, ended in times_open[line.worker, delivery.host]:
            if began < line.at < ended:
                late = f"{line.at - began:.3f} s after the breaker had opened"
                yield Violation(f"sent to {delivery.host} {late}", delivery.request_id)


def _may_be_lost(at: float, kills: list[float]) -> bool:
    """Return True if a kill may have lost a worker's log line of that time."""
    return any(abs(kill - at) <= LOGGED_WITHIN for kill in kills)


def _times_open(seen: Evidence) -> defaultdict[tuple[str, str | None], list[tuple[float, float]]]:
    """Return, by worker and host, the periods in which a breaker must not admit any attempt.

    They are shortened by the log's delay. They end when the host's row is removed: the host then
    loses its breaker, and a request that still has the old rows may create a new one.
    """
    times = defaultdict(list)
    for line in seen.openings():
        ended = line.at + seen.limits.open_seconds
        for absence in seen.absences:
            if absence.host == line.host and line.at <= absence.ended + LOGGED_WITHIN:
                ended = min(ended, absence.began)
        began, ended = line.at + LOGGED_WITHIN, ended - LOGGED_WITHIN
        if began < ended:
            times[line.worker, line.host].append((began, ended))
    return times


def delivered_once(seen: Evidence) -> Iterator[Violation]:
    """No provider received the same notification twice."""
    times = Counter((delivery.host, delivery.request_id) for delivery in seen.deliveries)
    for (host, request_id), count in times.items():
        if count > 1:
            yield Violation(f"{host} received it {count} times", request_id)


def nothing_leaks(seen: Evidence) -> Iterator[Violation]:
    """After the chaos there are as many workers as before, of about the same size."""
    before, after, limits = seen.before.size, seen.after.size, seen.limits
    most = Size(
        workers=before.workers,
        threads=before.threads + POOLS * limits.threads,
        files=before.files + limits.callers,
        to_providers=limits.hosts * limits.threads,
        memory=int(before.memory * MEMORY),
    )
    for name, bound in most._asdict().items():
        if (has := getattr(after, name)) > bound:
            yield Violation(f"{has} {name} after the chaos, at most {bound} allowed")
    if after.workers < before.workers:
        yield Violation(f"{after.workers} workers after the chaos, {before.workers} before")


def every_worker_knows_the_providers(seen: Evidence) -> Iterator[Violation]:
    """No worker lacks the providers, not even one that starts in an outage of PostgreSQL."""
    for line in seen.lines_with(UNREAD):
        yield Violation(f"{line.worker} had no providers", line.request_id)


def nothing_is_missing_in_the_log(seen: Evidence) -> Iterator[Violation]:
    """No line of the log was dropped: no reader stalled for long."""
    if seen.lines_dropped:
        yield Violation(f"{seen.lines_dropped} lines of the log were dropped")


def calm_delivers_everything(seen: Evidence) -> Iterator[Violation]:
    """Before the chaos and soon after it, every notification is delivered."""
    for began, ended, _ in (seen.before, seen.after):
        replies = [one for one in seen.replies if began <= one.began and one.ended <= ended]
        if not replies:
            yield Violation("no requests while nothing failed")
        for reply in replies:
            if reply.status != HTTPStatus.OK:
                yield Violation(f"{reply.status} although nothing failed", reply.request_id)


def everything_happened(seen: Evidence) -> Iterator[Violation]:
    """Every kind of fault happened and met requests, and there was enough load."""
    happened = {delivery.behaviour for delivery in seen.deliveries} | {*+seen.faults}
    for kind in sorted(seen.limits.kinds - happened):
        yield Violation(f"never happened: {kind}")
    required = {
        f"{seen.limits.requests} requests": len(seen.replies) >= seen.limits.requests,
        "a fallback": seen.fallbacks(),
        "a breaker that opens": seen.openings(),
        "an attempt that an open breaker refuses": seen.refusals(),
    }
    for event, occurred in required.items():
        if not occurred:
            yield Violation(f"never happened: {event}")


Invariant = Callable[[Evidence], Iterator[Violation]]

INVARIANTS: dict[str, Invariant] = {
    "a reply is 200 if and only if one provider of each channel accepted": replies_match_deliveries,
    "replies come within the deadline, errors in the error envelope": replied_in_time,
    "only kills cut connections, at most threads times kills": only_kills_cut,
    "nothing reaches a provider whose breaker is open": open_breakers_refuse,
    "nothing is delivered twice through the same provider": delivered_once,
    "no worker leaks threads, files or memory": nothing_leaks,
    "every worker knows the providers": every_worker_knows_the_providers,
    "no line of the log is dropped": nothing_is_missing_in_the_log,
    "every notification before and after the chaos is delivered": calm_delivers_everything,
    "every kind of fault happened, under load": everything_happened,
}


def check(seen: Evidence) -> dict[str, list[Violation]]:
    """Return the violations of each invariant."""
    return {name: [*invariant(seen)] for name, invariant in INVARIANTS.items()}
