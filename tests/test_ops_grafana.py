"""The files in `ops/grafana` match Grafana's formats. Grafana ignores what it cannot read."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.service import ROOT

GRAFANA = ROOT / "ops" / "grafana"
PROVISIONING = GRAFANA / "provisioning"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))

# Where ops/grafana/dashboards is mounted in Grafana's container.
MOUNTED = "/var/lib/grafana/dashboards"

COLUMNS = 24
UNITS = {"short", "s", "reqps", "percentunit"}
COLORS = {"green", "yellow", "red"}

# The options that each type of panel has beside the common ones.
OPTIONS = {
    "stat": {"colorMode", "graphMode", "justifyMode", "orientation", "reduceOptions", "textMode"},
    "timeseries": {"legend", "tooltip"},
    "state-timeline": {
        *("alignValue", "legend", "mergeValues", "rowHeight", "showValue", "tooltip"),
    },
    "table": {"cellHeight", "showHeader"},
}
CUSTOM = {
    "stat": set(),
    "timeseries": {
        *("drawStyle", "fillOpacity", "lineWidth", "showPoints", "spanNulls", "stacking"),
        "thresholdsStyle",
    },
    "state-timeline": {"fillOpacity", "lineWidth"},
    "table": {"align"},
}

Json = dict[str, Any]


def provisioned(kind: str) -> Iterator[Json]:
    """Yield the entries of all provisioning files in the folder `kind`."""
    entries = {"datasources": "datasources", "dashboards": "providers"}[kind]
    files = sorted((PROVISIONING / kind).iterdir())
    assert files
    for path in files:
        assert path.suffix == ".yml"  # Grafana reads .yml, .yaml and .json, and skips others
        content = yaml.safe_load(path.read_text())
        assert content.keys() == {"apiVersion", entries}
        assert content["apiVersion"] == 1
        yield from content[entries]


def test_the_provisioning_folder_has_only_folders_that_grafana_reads() -> None:
    assert {path.name for path in PROVISIONING.iterdir()} == {"datasources", "dashboards"}


def test_one_data_source_is_provisioned_and_it_is_prometheus() -> None:
    (source,) = provisioned("datasources")
    assert source.pop("jsonData") == {"timeInterval": scrape_interval(), "httpMethod": "POST"}
    assert source == {
        "name": "Prometheus",
        "uid": "prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": "http://prometheus:9090",
        "isDefault": True,
        "editable": False,
    }


def scrape_interval() -> str:
    shipped = yaml.safe_load((ROOT / "ops" / "prometheus" / "prometheus.yml").read_text())
    return str(shipped["global"]["scrape_interval"])


def test_one_provider_finds_the_dashboards_where_they_are_mounted() -> None:
    (provider,) = provisioned("dashboards")
    assert provider == {
        "name": "notifier",
        "type": "file",
        "allowUiUpdates": False,
        "updateIntervalSeconds": 30,
        "options": {"path": MOUNTED},
    }


def load(text: str) -> Json:
    """Parse a JSON object; fail if any object in it has a name twice."""

    def once(pairs: list[tuple[str, Any]]) -> Json:
        names = [name for name, _ in pairs]
        assert len(names) == len(set(names)), names
        return dict(pairs)

    return dict(json.loads(text, object_pairs_hook=once))


@pytest.fixture(scope="module", params=DASHBOARDS, ids=lambda path: path.stem)
def dashboard(request: pytest.FixtureRequest) -> Json:
    return load(request.param.read_text())


@pytest.fixture(scope="module")
def panels(dashboard: Json) -> list[Json]:
    """All panels except the rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def everything(value: Any) -> Iterator[Any]:
    """Yield a JSON value and, recursively, every value in it."""
    yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from everything(part)


def test_the_only_dashboard_is_the_notifiers() -> None:
    assert [path.name for path in (GRAFANA / "dashboards").iterdir()] == ["notifier.json"]


def test_a_dashboard_has_the_fields_that_grafana_needs(dashboard: Json) -> None:
    assert dashboard.keys() == {
        *("annotations", "description", "editable", "fiscalYearStartMonth", "graphTooltip"),
        *("links", "panels", "refresh", "schemaVersion", "tags", "templating", "time"),
        *("timepicker", "timezone", "title", "uid", "version", "weekStart"),
    }
    # Grafana migrates schema versions from 13 on; it does not check newer ones.
    assert dashboard["schemaVersion"] == 39
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", dashboard["uid"])
    assert dashboard["title"]
    assert dashboard["refresh"] == "10s"
    assert dashboard["time"].keys() == {"from", "to"}
    assert dashboard["graphTooltip"] in {0, 1, 2}
    assert "id" not in dashboard  # assigned by Grafana's database; a provisioned dashboard has none


def test_panel_ids_and_titles_are_unique(dashboard: Json) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert all(type(each) is int and each > 0 for each in ids)
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len(titles) == len(set(titles))


def cells(panel: Json) -> set[tuple[int, int]]:
    at = panel["gridPos"]
    assert at.keys() == {"x", "y", "w", "h"}
    assert all(type(each) is int for each in at.values())
    assert min(at["w"], at["h"]) > 0 <= min(at["x"], at["y"])
    columns = range(at["x"], at["x"] + at["w"])
    return set(itertools.product(columns, range(at["y"], at["y"] + at["h"])))


def test_panels_fill_the_grid_without_overlaps_or_holes(dashboard: Json) -> None:
    covered: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert covered.isdisjoint(cells(panel)), panel["title"]
        covered |= cells(panel)
    height = max(y for _, y in covered) + 1
    assert covered == set(itertools.product(range(COLUMNS), range(height)))


def test_panels_are_listed_in_the_order_of_their_positions(dashboard: Json) -> None:
    places = [(panel["gridPos"]["y"], panel["gridPos"]["x"]) for panel in dashboard["panels"]]
    assert places == sorted(places)


def test_rows_are_expanded_and_have_the_expected_titles(dashboard: Json) -> None:
    rows = [panel for panel in dashboard["panels"] if panel["type"] == "row"]
    for row in rows:
        assert row.keys() == {"id", "title", "type", "collapsed", "gridPos", "panels"}
        assert row["collapsed"] is False
        assert row["panels"] == []  # an expanded row's panels follow it in the list
        assert (row["gridPos"]["w"], row["gridPos"]["h"]) == (COLUMNS, 1)
    assert [row["title"] for row in rows] == [
        "Traffic",
        "Errors",
        "Latency by recipient",
        "Deliveries by provider",
        "Circuit breakers",
        "Cache",
        "Capacity",
        "Workers",
    ]


def test_every_panel_has_a_title_a_description_and_a_unit(panels: list[Json]) -> None:
    for panel in panels:
        assert panel.keys() == {
            *("id", "title", "description", "type", "datasource", "gridPos"),
            *("fieldConfig", "options", "targets"),
        }
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["options"].keys() == OPTIONS[panel["type"]]
        assert panel["fieldConfig"].keys() == {"defaults", "overrides"}
        defaults = panel["fieldConfig"]["defaults"]
        assert {"unit", "thresholds", "mappings", "color"} <= defaults.keys()
        assert defaults.keys() <= {
            *("unit", "thresholds", "mappings", "color"),
            *("custom", "decimals", "min", "max"),
        }
        assert defaults["unit"] in UNITS
        assert set(defaults.get("custom", ())) == CUSTOM[panel["type"]]


def test_thresholds_rise_from_a_base(panels: list[Json]) -> None:
    for panel in panels:
        thresholds = panel["fieldConfig"]["defaults"]["thresholds"]
        assert thresholds.keys() == {"mode", "steps"}
        assert thresholds["mode"] == "absolute"
        base, *others = thresholds["steps"]
        assert base["value"] is None
        values = [step["value"] for step in others]
        assert values == sorted(set(values))
        assert {step["color"] for step in thresholds["steps"]} <= COLORS


def test_a_panel_draws_a_line_at_the_threshold_of_the_alert_that_it_names(
    panels: list[Json],
) -> None:
    text = (ROOT / "ops" / "prometheus" / "rules.yml").read_text()
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    alerts = {rule["alert"]: rule["expr"] for rule in rules if "alert" in rule}
    lines = 0
    for panel in panels:
        for name in re.findall(r"Notifier[A-Z]\w+", panel["description"]):
            *_, last = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
            if last["value"] is not None:
                assert re.search(rf" > {last['value']}\b", alerts[name]), panel["title"]
                lines += 1
            assert name in alerts
    assert lines


def test_every_panel_queries_the_provisioned_data_source(panels: list[Json]) -> None:
    (source,) = provisioned("datasources")
    wanted = {"type": source["type"], "uid": source["uid"]}
    for panel in panels:
        assert panel["datasource"] == wanted
        assert panel["targets"]
        ids = [target["refId"] for target in panel["targets"]]
        assert ids == list("ABCDEFG"[: len(ids)])
        for target in panel["targets"]:
            assert target.keys() - {"format"} == {
                *("datasource", "editorMode", "expr", "instant", "legendFormat"),
                *("range", "refId"),
            }
            assert target["datasource"] == wanted
            assert target["range"] is not target["instant"]
            assert target.get("format", "table") == "table"
            assert (panel["type"] == "table") == ("format" in target)


def test_the_breakers_states_have_names_and_colours(panels: list[Json]) -> None:
    (timeline,) = (panel for panel in panels if panel["type"] == "state-timeline")
    (mapping,) = timeline["fieldConfig"]["defaults"]["mappings"]
    assert mapping["type"] == "value"
    shown = {value: (to["text"], to["color"]) for value, to in mapping["options"].items()}
    assert shown == {"0": ("closed", "green"), "1": ("open", "red"), "2": ("half-open", "yellow")}


def test_every_variable_is_used_and_is_defined_before_its_use(
    dashboard: Json, panels: list[Json]
) -> None:
    variables = dashboard["templating"]["list"]
    names = [variable["name"] for variable in variables]
    assert names == ["job", "instance"]
    (source,) = provisioned("datasources")
    for place, variable in enumerate(variables):
        assert variable["type"] == "query"
        assert variable["datasource"] == {"type": source["type"], "uid": source["uid"]}
        assert variable["multi"]
        assert variable["includeAll"]
        assert variable["current"]["value"] == ["$__all"]
        assert variable["refresh"] == 2  # when the time range changes
        assert used_in(variable["query"]["query"]) <= set(names[:place])
    for panel in panels:
        for target in panel["targets"]:
            assert used_in(target["expr"]) - {"__rate_interval"} <= set(names), panel["title"]
            assert "job" in used_in(target["expr"]), panel["title"]
    assert set(names) <= used_in(
        " ".join(target["expr"] for p in panels for target in p["targets"])
    )


def used_in(expression: str) -> set[str]:
    """Return the names of Grafana's variables in a text, in either notation."""
    assert "[[" not in expression
    return set(re.findall(r"\$\{?(\w+)", expression))


def test_a_variable_with_several_values_is_matched_by_regular_expression(
    panels: list[Json],
) -> None:
    for panel in panels:
        for target in panel["targets"]:
            for name in ("job", "instance"):
                expression = target["expr"].replace(f'{name}=~"${name}"', "")
                assert f"${name}" not in expression, panel["title"]


def test_a_dashboard_contains_no_links(dashboard: Json) -> None:
    for value in everything(dashboard):
        if isinstance(value, dict):
            assert not value.get("links"), value
            assert "url" not in value, value
