"""The queries in `ops/`: the service exports their metrics, and a real Prometheus answers them."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from notifier.cli.providers import providers
from notifier.settings import Settings
from notifier.store import migrations
from tests.fixtures import Environment, MakeProvider, connect
from tests.prometheus import SHIPPED, Prometheus
from tests.scripted_provider import ScriptedProvider, answer
from tests.service import ROOT, Service
from tests.sockets import refusing
from tests.timing import eventually

DOCUMENTS = ROOT / "docs"
DASHBOARDS = sorted((ROOT / "ops" / "grafana" / "dashboards").glob("*.json"))
NOTIFY = "/api/v1.0/recipient/<recipient>/notify"

# The values that replace Grafana's variables in a dashboard's expressions.
GRAFANA = {"$__rate_interval": "10m", "$job": ".*", "$instance": ".*"}

# Not a parser of PromQL: these patterns read expressions that Prometheus has formatted.
WORD = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
MATCHERS = r'\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}'
GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right) ?\(([^()]*)\)")
SELECTOR = re.compile(rf"(?<![\w:.$\"])({WORD})(?![\w:]|\s*\()({MATCHERS})?")
MATCHER = re.compile(rf'({WORD})(?:=~|!~|!=|=)"')
OPERATORS = {"and", "or", "unless", "bool", "offset", "Inf", "NaN"}

needs_promtool = pytest.mark.needs("promtool")
needs_prometheus = pytest.mark.needs("prometheus")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((SHIPPED / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECORDED = {rule["record"]: rule for rule in rules() if "record" in rule}


@cache
def panels() -> list[dict[str, Any]]:
    return [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]


def queries() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield a name and the target of each panel's queries, with Grafana's variables replaced."""
    for panel in panels():
        for target in panel.get("targets", []):
            expression = target["expr"]
            for variable, value in GRAFANA.items():
                expression = expression.replace(variable, value)
            yield f"{panel['title']} {target['refId']}", target | {"expr": expression}


QUERIES = dict(queries())
EXPRESSIONS = {name: each["expr"] for name, each in (ALERTS | RECORDED | QUERIES).items()}


@dataclass(frozen=True)
class Named:
    """The names in an expression: selectors as metric and matchers, and the grouping labels."""

    selectors: frozenset[tuple[str, str]]
    groups_by: frozenset[str]

    @classmethod
    def by(cls, formatted: str) -> "Named":
        lists = GROUPING.findall(formatted)
        found = SELECTOR.findall(GROUPING.sub("", formatted))
        return cls(
            frozenset(each for each in found if each[0] not in OPERATORS),
            frozenset(label for each in lists for label in re.findall(WORD, each)),
        )


def test_the_names_in_an_expression_are_found() -> None:
    formatted = (
        'sum by (job, le) (rate(a_total{b="x{y}",c!~"5.."}[5m] offset 1m)) or on (d) '
        "0 * job:e:rate5m / 1e+06 > bool 2.5"
    )
    assert Named.by(formatted) == Named(
        frozenset({("a_total", '{b="x{y}",c!~"5.."}'), ("job:e:rate5m", "")}),
        frozenset({"job", "le", "d"}),
    )


def promtool(*arguments: str, stdin: str | None = None) -> str:
    """Run promtool, which must succeed, and return its output."""
    done = subprocess.run(
        ["promtool", *arguments],
        cwd=SHIPPED,
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [
        "check config prometheus.yml",
        "check rules --lint-fatal rules.yml",
        "test rules rules_test.yml",
    ],
)
@pytest.mark.usefixtures("processes")
def test_promtool_accepts_the_shipped_files(command: str) -> None:
    assert "SUCCESS" in promtool(*command.split())


def test_a_scrape_ends_before_the_next_begins() -> None:
    shipped = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    interval, timeout = (
        int(shipped["global"][name].removesuffix("s"))
        for name in ("scrape_interval", "scrape_timeout")
    )
    assert timeout < interval
    (scrape,) = shipped["scrape_configs"]
    assert scrape["job_name"] == "notifier"
    assert scrape["static_configs"] == [{"targets": ["notifier:8080"]}]


def test_every_recorded_name_has_the_form_level_metric_operation() -> None:
    for name in RECORDED:
        assert re.fullmatch(r"[a-z_]+:[a-z_]+:[a-z0-9_]+", name), name


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_has_a_severity_and_says_what_is_wrong_and_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"].keys() == {"severity"}
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert alert["annotations"].keys() == {"summary", "description", "runbook"}
    # The problem, a colon, and the remedy in the imperative.
    assert re.fullmatch(r"[^:]+[^:]*: [a-z][^:]+", re.sub(r"{{.*?}}", "X", summary_of(alert)))
    assert len(alert["annotations"]["description"]) > len(summary_of(alert))


def summary_of(alert: dict[str, Any]) -> str:
    return str(alert["annotations"]["summary"])


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_is_tested_both_firing_and_silent(name: str) -> None:
    cases = yaml.safe_load((SHIPPED / "rules_test.yml").read_text())["tests"]
    ends = {
        bool(check["exp_alerts"])
        for case in cases
        for check in case.get("alert_rule_test", [])
        if check["alertname"] == name
    }
    assert ends == {True, False}


def test_the_commands_that_alerts_name_exist() -> None:
    texts = [text for alert in ALERTS.values() for text in alert["annotations"].values()]
    named = re.findall(r"flask --app notifier\.app providers (\w+)", " ".join(texts))
    assert {"list", "edit", "remove", "restore"} == set(named)
    assert set(named) <= providers.commands.keys()


@pytest.mark.parametrize("name", ALERTS)
def test_everything_that_an_alert_quotes_exists(name: str) -> None:
    """An alert quotes log lines, sections of the documents and panels of the dashboard."""
    logged = "".join(path.read_text() for path in (ROOT / "notifier").rglob("*.py"))
    documents = "".join(path.read_text() for path in DOCUMENTS.glob("*.md"))
    titles = {panel["title"] for panel in panels()}
    text = re.sub(r"{{.*?}}", "", " ".join(ALERTS[name]["annotations"].values()))
    for quoted in re.findall(r'"([^"]+)"', text):
        assert f'"{quoted}"' in logged or f"## {quoted}\n" in documents or quoted in titles, quoted
    for variable in re.findall(r"\b[A-Z]+_[A-Z_]+\b", text):
        assert f"`{variable}`" in documents, variable
    for path in re.findall(r"GET (/[a-z]+)", text):
        assert f'"{path}"' in logged, path


@dataclass(frozen=True)
class Watched:
    """A service after varied traffic and failures, and the Prometheus that scraped it."""

    service: Service
    prometheus: Prometheus

    def page(self) -> str:
        return requests.get(f"{self.service.url}/metrics", timeout=10).text


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, server: Environment) -> Iterator[Watched]:
    """Three workers whose emails fall back from two failing providers to a third; no push."""
    folder = tmp_path_factory.mktemp("watched")
    environment = server | {"DB_NAME": "watched", "WEB_CONCURRENCY": "3"}
    with ScriptedProvider(answer(503)) as down, ScriptedProvider() as up, refusing() as refused:
        _make_database(environment, [down.url, f"http://127.0.0.1:{refused}/", up.url])
        service = Service(folder, environment).wait_until_ready()
        try:
            with Prometheus(folder, f"127.0.0.1:{service.port}") as prometheus:
                _send_traffic(service, prometheus)
                prometheus.wait_for_rules()
                yield Watched(service, prometheus)
        finally:
            service.stop()


def _make_database(environment: Environment, urls: list[str]) -> None:
    with connect(environment | {"DB_NAME": "postgres"}) as connection:
        connection.execute("CREATE DATABASE watched")
    migrations.migrate(Settings.from_env(environment))
    with connect(environment) as connection:
        for priority, url in enumerate(urls):
            connection.execute(
                "INSERT INTO notification_preferences"
                " (provider_type, provider_name, host, priority) VALUES ('Email', %s, %s, %s)",
                (f"provider {priority}", url, priority),
            )


def _send_traffic(service: Service, prometheus: Prometheus) -> None:
    """Send traffic twice, with a scrape in between: a rate misses a new series' first value."""
    for round_ in (1, 2):
        assert [service.notify("buyer").status_code for _ in range(30)] == [200] * 30
        assert [service.notify("seller").status_code for _ in range(5)] == [500] * 5
        assert service.notify("nobody").status_code == 422
        seen = f'sum(http_server_requests_total{{http_route="{NOTIFY}"}})'
        eventually(lambda: prometheus.value(seen) == round_ * 36)  # noqa: B023 called at once


@pytest.fixture(scope="module")
def exported(watched: Watched) -> dict[str, set[str]]:
    """The labels of every metric of the service, including recorded ones and `up`."""

    labels: dict[str, set[str]] = {}
    for series in watched.prometheus.ask("series", **{"match[]": '{job="notifier"}'}):
        labels.setdefault(series["__name__"], set()).update(series.keys() - {"__name__"})
    return labels


@needs_prometheus
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_names_only_what_the_service_exports(
    name: str, watched: Watched, exported: dict[str, set[str]]
) -> None:
    named = Named.by(watched.prometheus.ask("format_query", query=EXPRESSIONS[name]))
    assert named.selectors
    for metric, matchers in named.selectors:
        assert metric in exported
        assert set(MATCHER.findall(matchers)) <= exported[metric]
        assert named.groups_by <= exported[metric]
        # A label value that does not exist matches nothing. A transient series existed recently.
        selector = f"{metric}{matchers}"
        assert watched.prometheus.query(f"last_over_time({selector}[10m])"), selector


@needs_prometheus
@pytest.mark.parametrize("name", [*RECORDED, *QUERIES])
def test_an_expression_is_answered_with_numbers(name: str, watched: Watched) -> None:
    values = [sample["value"][1] for sample in watched.prometheus.query(EXPRESSIONS[name])]
    assert values
    assert "NaN" not in values


@needs_prometheus
@pytest.mark.parametrize("name", QUERIES)
def test_a_legend_shows_labels_that_the_answer_has(name: str, watched: Watched) -> None:
    wanted = set(re.findall(r"{{(\w+)}}", QUERIES[name]["legendFormat"]))
    samples = watched.prometheus.query(EXPRESSIONS[name])
    assert wanted <= {label for sample in samples for label in sample["metric"]}
    if len(samples) > 1 and QUERIES[name].get("format") != "table":
        assert wanted, "which line is which?"


@needs_prometheus
def test_a_variable_of_the_dashboard_finds_its_values(watched: Watched) -> None:
    for path in DASHBOARDS:
        for variable in json.loads(path.read_text())["templating"]["list"]:
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert match
            selector, label = match[1].replace("$job", ".*"), match[2]
            parameters = {"match[]": selector}
            assert len(watched.prometheus.ask(f"label/{label}/values", **parameters)) == 1


@needs_prometheus
def test_every_rule_works_and_a_channel_without_provider_fires_at_once(watched: Watched) -> None:
    prometheus = watched.prometheus
    firing = prometheus.query('ALERTS{alertname="NotifierNoProvider", alertstate="firing"}')
    assert [sample["metric"]["channel"] for sample in firing] == ["PushNotification"]
    pending = 'count(ALERTS{alertname="NotifierBreakerOpen", alertstate="pending"})'
    assert prometheus.value(pending) == 2
    groups = prometheus.ask("rules")["groups"]
    unwell = [rule for group in groups for rule in group["rules"] if rule["health"] != "ok"]
    assert not unwell


@needs_prometheus
@needs_promtool
def test_promtool_finds_no_fault_in_the_metrics(watched: Watched) -> None:
    assert promtool("check", "metrics", stdin=watched.page()) == ""


def rows(*columns: str) -> list[tuple[str, ...]]:
    """Return the rows of docs/monitoring.md whose first cells match these patterns."""
    cells = r" \| ".join(f"({column})" for column in columns)
    pattern = re.compile(rf"\| {cells} \| .+ \|")
    lines = (DOCUMENTS / "monitoring.md").read_text().splitlines()
    return [match.groups() for line in lines if (match := pattern.fullmatch(line))]


@needs_prometheus
def test_the_monitoring_page_lists_every_metric_with_its_type_and_labels(watched: Watched) -> None:
    exported = {}
    for family in text_string_to_metric_families(watched.page()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        exported[f"`{name}`"] = (family.type, labels)
    documented = rows("`[a-z_]+`", "(?:counter|gauge|histogram)[^|]*", "none|[a-z_ `]+")
    assert len(documented) == len(exported)
    for metric, type_, labels in documented:
        assert exported[metric] == (re.split("[,:]", type_)[0], set(re.findall("`(.+?)`", labels)))


def test_the_monitoring_page_lists_every_alert_with_its_severity() -> None:
    shipped = [(f"`{name}`", alert["labels"]["severity"]) for name, alert in ALERTS.items()]
    assert rows("`Notifier[A-Za-z]+`", "critical|warning") == shipped


@pytest.mark.parametrize("name", ALERTS)
def test_the_runbook_of_an_alert_is_its_own_section(name: str) -> None:
    page, _, anchor = ALERTS[name]["annotations"]["runbook"].partition("#")
    assert anchor == name.lower()
    assert f"\n## {name}\n" in (ROOT / page).read_text()


@needs_prometheus
def test_prometheus_counts_exactly_the_requests_that_three_workers_answered(
    tmp_path: Path,
    start_service: Callable[..., Service],
    make_provider: MakeProvider,
    add_provider: Callable[..., int],
) -> None:
    add_provider(make_provider().url)
    service = start_service(WEB_CONCURRENCY="3")
    with ThreadPoolExecutor(20) as callers:
        replies = list(callers.map(lambda _: service.notify(), range(350)))
    assert {reply.status_code for reply in replies} == {200}

    labels = f'http_route="{NOTIFY}",http_status_code="200"'
    delivered = f"sum(http_server_requests_total{{{labels}}})"
    with Prometheus(tmp_path, f"127.0.0.1:{service.port}") as prometheus:
        eventually(lambda: prometheus.value(delivered) is not None)
        assert prometheus.value(delivered) == 350
        assert prometheus.value("sum(worker_starts_total)") == 3
