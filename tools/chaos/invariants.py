"""What has to hold whatever fails, checked request by request."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import NamedTuple

from tools.chaos.evidence import ADMITTED, FAILED, Evidence, Reply, Size

CHANNELS = {"buyer": {"Email"}, "seller": {"Email", "PushNotification"}}
CODES: dict[int, str] = {
    HTTPStatus.INTERNAL_SERVER_ERROR: "E102",
    HTTPStatus.SERVICE_UNAVAILABLE: "E106",
}

# Seconds between what happens in a worker and the line about it: its threads take turns.
LOGGED_WITHIN = 0.25
CUT_WITHIN = 2.0  # seconds that a killed process's connections may take to end

# How an attempt fails with a provider that has accepted: the answer came too late.
UNHEARD = frozenset({"timeout", "deadline"})

# So many times `threads`: the pools of threads, for requests, those that wait, and second channels.
POOLS = 4
MEMORY = 1.5  # so many times as much as before


class Violation(NamedTuple):
    """What does not hold, and of which request, if it is about one."""

    what: str
    request_id: str | None = None


def delivered_as_said(seen: Evidence) -> Iterator[Violation]:
    """A 200 was accepted by exactly one provider of each channel, an error not by one of each."""
    unheard = {
        (line.request_id, line.host) for line in seen.lines_with(FAILED) if line.reason in UNHEARD
    }
    accepted = seen.accepted()
    for reply in seen.replies:
        heard = [
            delivery.channel
            for delivery in accepted.get(reply.request_id, [])
            if (reply.request_id, delivery.host) not in unheard
        ]
        wanted = Counter(CHANNELS[reply.recipient])
        if reply.status and (reply.status == HTTPStatus.OK) != (Counter(heard) == wanted):
            yield Violation(f"{reply.status}, accepted for {sorted(heard)}", reply.request_id)


def replied_in_time(seen: Evidence) -> Iterator[Violation]:
    """Every reply came within the deadline, and every error with its envelope."""
    most = seen.limits.deadline + seen.limits.margin
    for reply in seen.replies:
        if reply.cut:
            continue
        if not reply.status or reply.seconds > most:
            yield Violation(
                f"{reply.status or 'nothing'} after {reply.seconds:.2f} s", reply.request_id
            )
        elif reply.headers.get("X-Request-Id") != reply.request_id:
            yield Violation("the reply has another request's id", reply.request_id)
        elif reply.status != HTTPStatus.OK and not _has_envelope(reply):
            yield Violation(f"{reply.status} with {reply.body}", reply.request_id)


def _has_envelope(reply: Reply) -> bool:
    match reply.body:
        case {"error": {"code": str(code), "message": str(), **more}, **others}:
            promised = "Retry-After" in reply.headers or code != "E106"
            return code == CODES.get(reply.status) and promised and not more and not others
    return False


def cut_by_kills_only(seen: Evidence) -> Iterator[Violation]:
    """Connections end without a reply when a worker is killed, at most as many as it serves."""
    cut = [reply for reply in seen.replies if reply.cut]
    for reply in cut:
        if not any(0 <= reply.ended - kill <= CUT_WITHIN for kill in seen.kills):
            yield Violation("cut, and no worker had been killed", reply.request_id)
    if len(cut) > (most := seen.limits.threads * len(seen.kills)):
        yield Violation(f"{len(cut)} connections were cut, {most} at most by kills")


def open_breakers_refuse(seen: Evidence) -> Iterator[Violation]:
    """What reached a provider had been admitted, and not while the worker's breaker was open."""
    admitted = {(line.host, line.request_id): line for line in seen.lines_with(ADMITTED)}
    times_open = _times_open(seen)
    for delivery in seen.deliveries:
        line = admitted.get((delivery.host, delivery.request_id))
        if not line or line.at > delivery.received + LOGGED_WITHIN:
            yield Violation(f"{delivery.host} was not asked for", delivery.request_id)
            continue
        for began, ended in times_open[line.worker, delivery.host]:
            if began < line.at < ended:
                late = f"{line.at - began:.3f} s after the breaker had opened"
                yield Violation(f"sent to {delivery.host} {late}", delivery.request_id)


def _times_open(seen: Evidence) -> defaultdict[tuple[str, str | None], list[tuple[float, float]]]:
    """Return by worker and host when nothing may be admitted, whatever the log's delay.

    A host whose row goes loses its breaker, and has a new one from then on: in a worker that reads
    the rows, or that serves a request which knows older ones.
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
    """No provider has received the same notification twice."""
    times = Counter((delivery.host, delivery.request_id) for delivery in seen.deliveries)
    for (host, request_id), count in times.items():
        if count > 1:
            yield Violation(f"{host} received it {count} times", request_id)


def nothing_leaks(seen: Evidence) -> Iterator[Violation]:
    """Afterwards the workers are as many and about as large as they were before."""
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
            yield Violation(f"{has} {name} afterwards, {bound} at most")
    if after.workers < before.workers:
        yield Violation(f"{after.workers} workers afterwards, {before.workers} before")


def all_is_well_when_nothing_fails(seen: Evidence) -> Iterator[Violation]:
    """Before the chaos and soon after it every notification is delivered."""
    for began, ended, _ in (seen.before, seen.after):
        replies = [one for one in seen.replies if began <= one.began and one.ended <= ended]
        if not replies:
            yield Violation("nobody called")
        for reply in replies:
            if reply.status != HTTPStatus.OK:
                yield Violation(f"{reply.status} although nothing failed", reply.request_id)


def run_means_something(seen: Evidence) -> Iterator[Violation]:
    """Every fault was made and met, and there was a load."""
    met = {delivery.behaviour for delivery in seen.deliveries} | {*+seen.faults}
    for kind in sorted(seen.limits.kinds - met):
        yield Violation(f"{kind}: never")
    enough = {
        f"{seen.limits.requests} requests": len(seen.replies) >= seen.limits.requests,
        "a fallback": seen.fallbacks(),
        "a breaker that opens": seen.openings(),
        "an attempt that an open breaker refuses": seen.refusals(),
    }
    for what, happened in enough.items():
        if not happened:
            yield Violation(f"{what}: never")


Invariant = Callable[[Evidence], Iterator[Violation]]

INVARIANTS: dict[str, Invariant] = {
    "a 200 was accepted by one provider of each channel, an error was not": delivered_as_said,
    "replies come within the deadline, errors in their envelope": replied_in_time,
    "connections are cut by kills only, as many as threads times kills": cut_by_kills_only,
    "nothing reaches a provider whose breaker is open": open_breakers_refuse,
    "nothing is delivered twice through the same provider": delivered_once,
    "no worker leaks threads, files or memory": nothing_leaks,
    "before and afterwards every notification is delivered": all_is_well_when_nothing_fails,
    "the run means something": run_means_something,
}


def check(seen: Evidence) -> dict[str, list[Violation]]:
    """Return the violations of each invariant."""
    return {name: [*invariant(seen)] for name, invariant in INVARIANTS.items()}
