"""A real Prometheus with the files that `ops/prometheus` ships, scraping a test's service."""

import os
import subprocess
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.service import ROOT, clean_environment, free_port
from tests.timing import eventually

SHIPPED = ROOT / "ops" / "prometheus"

Samples = list[dict[str, Any]]


class Prometheus:
    """Scrapes `target` (`host:port`) every half second, more often than as shipped.

    Its data and its log are in `folder`.
    """

    def __init__(self, folder: Path, target: str) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._log = folder / "prometheus.log"
        config = folder / "prometheus.yml"
        config.write_text(yaml.safe_dump(_pointed_at(target)))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "Prometheus":
        """Return once the target has been scraped and every rule has been evaluated."""
        try:
            eventually(self._is_working, 30)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def query(self, expression: str) -> Samples:
        """Return the samples of an instant query; a scalar becomes one sample without labels."""
        data = self.ask("query", query=expression)
        if data["resultType"] == "vector":
            return list(data["result"])
        return [{"metric": {}, "value": data["result"]}]

    def value(self, expression: str) -> float | None:
        """Return the value of a query's only sample, or None if it has no sample."""
        samples = self.query(expression)
        assert len(samples) <= 1, samples
        return float(samples[0]["value"][1]) if samples else None

    def ask(self, endpoint: str, **parameters: str) -> Any:
        """Call an endpoint of Prometheus's HTTP API and return the reply's data."""
        url = f"{self._url}/api/v1/{endpoint}"
        reply = requests.get(url, params=parameters, timeout=10).json()
        assert reply["status"] == "success", f"{parameters}: {reply['error']}"
        return reply["data"]

    def wait_for_rules(self) -> None:
        """Return once every rule has been evaluated over the samples scraped so far."""
        for _ in range(2):  # the first evaluation may have begun before this call
            before = self._evaluations()
            eventually(lambda: before.isdisjoint(self._evaluations()))  # noqa: B023 called within the loop

    def _evaluations(self) -> set[tuple[str, str]]:
        groups = self.ask("rules")["groups"]
        return {(group["name"], group["lastEvaluation"]) for group in groups}

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)

    def _is_working(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        return self._is_ready() and self._has_evaluated() and self.value("up") == 1

    def _is_ready(self) -> bool:
        try:
            return requests.get(f"{self._url}/-/ready", timeout=10).ok
        except requests.ConnectionError:
            return False

    def _has_evaluated(self) -> bool:
        rules = [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]
        return bool(rules) and all(rule["health"] != "unknown" for rule in rules)


def _pointed_at(target: str) -> dict[str, Any]:
    """Return the shipped configuration with shorter intervals and another target."""
    config: dict[str, Any] = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    scrape["static_configs"] = [{"targets": [target]}]
    config["rule_files"] = [os.fspath(SHIPPED / name) for name in config["rule_files"]]
    config["global"] = {
        "scrape_interval": "500ms",
        "scrape_timeout": "500ms",
        "evaluation_interval": "500ms",
    }
    return config
