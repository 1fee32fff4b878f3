"""The report: short tables, and the records of violations."""

from collections import Counter
from collections.abc import Mapping
from http import HTTPStatus

from tools.chaos.evidence import Evidence, Reply, Size
from tools.chaos.invariants import Violation

SHOWN = 3  # of each invariant's violations


def report(seen: Evidence, violations: Mapping[str, list[Violation]]) -> str:
    """Return the tables, and all records of the first violations."""
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {figure} |" for name, figure in _figures(seen).items()]
    lines += ["", "| invariant | violations |", "|---|---|"]
    lines += [f"| {name} | {len(found)} |" for name, found in violations.items()]
    for name, found in violations.items():
        for violation in found[:SHOWN]:
            lines += ["", f"{name}: {violation.request_id or ''} {violation.problem}"]
            lines += seen.records_of(violation.request_id) if violation.request_id else []
    return "\n".join(lines)


def _figures(seen: Evidence) -> dict[str, object]:
    delivered = [one for one in seen.replies if one.status == HTTPStatus.OK]
    errors = [one for one in seen.replies if one.status not in (0, HTTPStatus.OK)]
    cut = sum(one.cut for one in seen.replies)
    limits = seen.limits
    hostile = [one.behaviour for one in seen.deliveries if one.behaviour in limits.kinds]
    return {
        "requests": len(seen.replies),
        "200 replies; the slowest": f"{len(delivered)}; {_slowest(delivered)}",
        "other replies": _counts(Counter(str(one.status) for one in errors)),
        "the slowest other reply; the deadline": f"{_slowest(errors)}; {limits.deadline:g} s",
        "margin for a loaded machine": f"{limits.margin:g} s",
        "connections cut; kills explain at most": f"{cut}; {limits.threads * len(seen.kills)}",
        "deliveries to providers": len(seen.deliveries),
        "notifications accepted by two providers of a channel, one too late": _twice(seen),
        "notifications delivered after a failed attempt": seen.fallbacks(),
        "breakers opened": len(seen.openings()),
        "attempts refused by a breaker": seen.refusals(),
        "faults": _counts(seen.faults),
        "left out": seen.left_out or "nothing",
        "hostile answers": _counts(Counter(hostile)),
        "largest worker before the chaos": _size(seen.before.size),
        "largest worker after the chaos": _size(seen.after.size),
    }


def _twice(seen: Evidence) -> int:
    channels = ([one.channel for one in accepted] for accepted in seen.accepted().values())
    return sum(len(accepted) > len({*accepted}) for accepted in channels)


def _slowest(replies: list[Reply]) -> str:
    return f"{max((one.seconds for one in replies), default=0.0):.2f} s"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _size(size: Size) -> str:
    memory = f"{size.memory / 2**20:.0f} MiB"
    connections = f"{size.to_providers} connections to providers"
    return f"{size.threads} threads, {connections}, {size.files} other files, {memory}"
