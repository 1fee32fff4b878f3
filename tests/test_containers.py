"""The image and the compose file for real: built, started, used and stopped, in this order.

They need an engine and docker-compose.yml's ports, and say on the way what they measure.
"""

import faulthandler
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
import requests

from tests.service import MESSAGE, ROOT
from tests.test_structure import pinned
from tests.timing import eventually

pytestmark = pytest.mark.needs("containers")

PROJECT = f"notifier-test-{os.getpid()}"
IMAGE = "notifier:local"
SERVICE = "http://127.0.0.1:8080"
EMAIL_1, EMAIL_2, PUSH_1, PUSH_2 = (f"http://127.0.0.1:{port}" for port in range(9090, 9094))
PROMETHEUS = "http://127.0.0.1:9095"
ONE_SHOTS = {"migrate", "seed"}
RUNNING = {"notifier", "postgres", "prometheus", "providers"}

# What pip installed, tools, pip's cache, our files, which lack bytecode, which others may change.
CONTENTS = """
import json
import shutil
from importlib.metadata import distributions
from importlib.util import cache_from_source
from pathlib import Path

installed = [found for found in distributions() if found.read_text("INSTALLER").strip() == "pip"]
files = [path for path in Path("/app").rglob("*") if path.is_file()]
sources = [path for path in files if path.suffix != ".pyc"]
modules = [path for path in sources if path.is_relative_to("/app/notifier")]
print(json.dumps({
    "packages": {found.name.lower().replace("_", "-"): found.version for found in installed},
    "tools": [name for name in ("cc", "gcc", "make", "git", "curl") if shutil.which(name)],
    "caches": [path for path in ("/root/.cache", "/.cache") if Path(path).exists()],
    "files": sorted(str(path.relative_to("/app")) for path in sources),
    "uncompiled": [str(path) for path in modules if not Path(cache_from_source(path)).exists()],
    "writable": [str(path) for path in files if path.stat().st_uid or path.stat().st_mode & 0o022],
}))
"""

Say = Callable[[str], None]


@pytest.fixture(scope="module")
def say(request: pytest.FixtureRequest) -> Say:
    """Write a line where whoever runs the tests sees it."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            sys.stderr.write(f"\n  {line}\n")  # in a process of xdist's there is no reporter

    return say


def docker(*arguments: str, seconds: float = 120) -> str:
    """Run docker and return what it wrote; it has to succeed."""
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        env=os.environ | {"COMPOSE_PROFILES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout}{done.stderr}"
    return done.stdout


def compose(*arguments: str, seconds: float = 120) -> str:
    return docker("compose", "--project-name", PROJECT, *arguments, seconds=seconds)


def containers() -> dict[str, dict[str, Any]]:
    """Return what docker knows of each service's container."""
    described = json.loads(docker("inspect", *compose("ps", "--all", "--quiet").split()))
    return {each["Config"]["Labels"]["com.docker.compose.service"]: each for each in described}


@pytest.fixture(scope="module", autouse=True)
def _system(processes: None, say: Say) -> Iterator[None]:
    """Build the image and start the system; at the end nothing of it is left."""
    # Images may have to be downloaded first. Every command here has a limit of its own.
    faulthandler.cancel_dump_traceback_later()
    began = time.monotonic()
    compose("build", seconds=600)
    say(f"built in {time.monotonic() - began:.1f} s")
    try:
        began = time.monotonic()
        compose("up", "--detach", "--wait", "--wait-timeout", "120", seconds=600)
        say(f"up in {time.monotonic() - began:.1f} s, exit code 0")
        yield
    except AssertionError:
        say(compose("logs", "--no-color", "--tail=20"))
        raise
    finally:
        compose("down", "--volumes")


def test_the_image_is_small_and_its_user_is_a_number(say: Say) -> None:
    (image,) = json.loads(docker("image", "inspect", IMAGE))
    size, user = image["Size"] / 1e6, image["Config"]["User"]
    say(f"image: {size:.0f} MB, user {user}")
    assert size < 300
    assert re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", user)


def test_the_image_has_what_production_needs_and_nothing_else() -> None:
    run = ("run", "--rm", "--network=none", "--read-only", "--user=0", "--entrypoint=python")
    contents = json.loads(docker(*run, IMAGE, "-c", CONTENTS))
    contents["packages"].pop("pip", None)  # the base's
    ours = [
        *(ROOT / "notifier").rglob("*.py"),
        *ROOT.glob("migrations/*.sql"),
        ROOT / "gunicorn.conf.py",
    ]
    assert contents == {
        "packages": pinned("requirements.txt"),
        "tools": [],
        "caches": [],
        "files": sorted(str(path.relative_to(ROOT)) for path in ours),
        "uncompiled": [],
        "writable": [],
    }


def test_every_container_is_healthy_or_has_done_its_work(say: Say) -> None:
    states = {name: each["State"] for name, each in containers().items()}
    assert states.keys() == RUNNING | ONE_SHOTS
    for name, state in states.items():
        if name in ONE_SHOTS:
            assert (state["Status"], state["ExitCode"]) == ("exited", 0)
        else:
            assert (state["Status"], state["Health"]["Status"]) == ("running", "healthy")
    say("healthy: " + ", ".join(sorted(RUNNING)) + "; exit code 0: " + ", ".join(sorted(ONE_SHOTS)))


@pytest.mark.parametrize("name", sorted(RUNNING))
def test_a_container_runs_without_root_and_without_privileges(name: str) -> None:
    status = compose("exec", "-T", name, "cat", "/proc/1/status")
    fields = dict(re.findall(r"^(\w+):\s+(.*)$", status, re.MULTILINE))
    assert "0" not in fields["Uid"].split()
    assert int(fields["CapBnd"], 16) == int(fields["CapEff"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    mounts = compose("exec", "-T", name, "cat", "/proc/1/mounts").splitlines()
    (root,) = [line.split() for line in mounts if line.split()[1] == "/"]
    assert "ro" in root[3].split(",")


def test_the_images_own_health_check_passes() -> None:
    (image,) = json.loads(docker("image", "inspect", IMAGE))
    kind, *command = image["Config"]["Healthcheck"]["Test"]
    assert kind == "CMD"
    compose("exec", "-T", "notifier", *command)
    with pytest.raises(AssertionError, match="Connection refused"):
        compose("exec", "-T", "--env", "HTTP_SERVER_PORT=:81", "notifier", *command)


def rows() -> list[str]:
    query = "SELECT host FROM notification_preferences ORDER BY id"
    psql = ("psql", "--username=notifier", "--tuples-only", "--no-align", "--command", query)
    return compose("exec", "-T", "postgres", *psql).split()


def test_the_seed_adds_four_rows_once(say: Say) -> None:
    four = [f"http://providers:{port}/" for port in range(9090, 9094)]
    assert rows() == four
    assert compose("run", "--rm", "-T", "seed") == "there are providers already\n"
    assert rows() == four
    say(f"rows: {' '.join(four)}; a second seed added none")


def test_the_service_may_read_the_providers_and_nothing_else(say: Say) -> None:
    code = """
import os, sys
from notifier.store.db import Database
from notifier.settings import Settings
with Database(Settings.from_env(os.environ)).connect() as connection:
    connection.execute(sys.argv[1])
"""
    run = ("exec", "-T", "notifier", "python", "-c", code)
    compose(*run, "SELECT * FROM notification_preferences")
    for statement in ("DELETE FROM notification_preferences", "CREATE TEMPORARY TABLE mine ()"):
        with pytest.raises(AssertionError, match="permission denied"):
            compose(*run, statement)
    assert "DB_MIGRATION" not in compose("exec", "-T", "notifier", "env")
    say("the service's role reads the providers and cannot change them")


def notify(recipient: str, **fields: str) -> requests.Response:
    url = f"{SERVICE}/api/v1.0/recipient/{recipient}/notify"
    return requests.post(url, json=MESSAGE | fields, timeout=40)


def titles(provider: str) -> list[str]:
    messages = requests.get(f"{provider}/messages", timeout=10).json()["messages"]
    return [message["title"] for message in messages]


def test_a_sellers_notification_arrives_at_an_email_and_a_push_provider(say: Say) -> None:
    title = uuid4().hex
    reply = notify("seller", title=title)
    say(f"notification to a seller: {reply.status_code} {reply.text.strip()}")
    assert reply.status_code == 200
    assert reply.json() == {"message": "notification sent successfully"}
    reached = [url for url in (EMAIL_1, EMAIL_2, PUSH_1, PUSH_2) if title in titles(url)]
    assert reached == [EMAIL_1, PUSH_1]


def test_the_sandbox_page_shows_the_notification_and_the_services_breakers() -> None:
    state = requests.get(f"{EMAIL_1}/sandbox/state", timeout=10).json()
    assert state["service_answers"]
    assert [provider["breaker"] for provider in state["providers"]] == ["closed"] * 4
    received = [message["provider"] for message in state["notifications"][0]["received"]]
    assert sorted(received) == ["email 1", "push 1"]


def asked(query: str) -> float | None:
    """Return what Prometheus has for a query with one answer; None if it has none yet."""
    parameters = {"query": query}
    reply = requests.get(f"{PROMETHEUS}/api/v1/query", params=parameters, timeout=10).json()
    results = reply["data"]["result"]
    return float(results[0]["value"][1]) if results else None


def test_a_notification_is_counted_in_prometheus(say: Say) -> None:
    query = 'sum(notifications_total{recipient="seller", outcome="delivered"})'
    eventually(lambda: asked(query) is not None, 30)
    before = asked(query) or 0
    assert notify("seller").status_code == 200
    eventually(lambda: (asked(query) or 0) > before, 30)
    say(f"Prometheus: {query} is {asked(query):g}")


def behave(provider: str, behaviour: str, delay: float) -> None:
    body = {"behaviour": behaviour, "delay": delay}
    requests.put(f"{provider}/behaviour", json=body, timeout=10).raise_for_status()


def test_a_request_under_way_gets_its_answer_while_the_container_stops(say: Say) -> None:
    behave(EMAIL_1, "slow", 30)  # up to HTTP_CLIENT_TIMEOUT, and so to the end of DRAIN_DELAY
    behave(EMAIL_2, "slow", 3)
    title = uuid4().hex
    with ThreadPoolExecutor() as pool:
        request = pool.submit(notify, "buyer", title=title)
        eventually(lambda: title in titles(EMAIL_1), 10)
        began = time.monotonic()
        compose("stop", "notifier")
        took = time.monotonic() - began
        reply = request.result(timeout=10)
    assert reply.status_code == 200
    assert title in titles(EMAIL_2)
    code = containers()["notifier"]["State"]["ExitCode"]
    say(f"stop with a request under way: {took:.1f} s, exit code {code}, reply {reply.status_code}")
    assert code == 0
    assert took > 7


def test_everything_ends_with_exit_code_0(say: Say) -> None:
    compose("stop")
    codes = {name: each["State"]["ExitCode"] for name, each in containers().items()}
    say(f"exit codes: {codes}")
    assert codes == dict.fromkeys(RUNNING | ONE_SHOTS, 0)
