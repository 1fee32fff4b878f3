"""What can be said about the image and the compose file without building or starting anything."""

import json
import re
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml

from notifier.environ import parse_duration
from notifier.settings import Settings
from tests.service import ROOT
from tests.test_structure import gunicorn_conf
from tools.dev.seed import PROVIDERS

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOTS = {"migrate", "seed"}
HOME = "127.0.0.1"


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions and their arguments, one line each."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] != "#"]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.split("\n"))]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def parsed_command(name: str) -> list[str]:
    """Return the only CMD or HEALTHCHECK as the list it is; a shell form is no JSON."""
    (text,) = arguments(name)
    words = json.loads(text[text.index("[") :])
    assert words
    assert all(isinstance(word, str) for word in words)
    return list(words)


def tagged(image: str) -> bool:
    return re.fullmatch(r"[a-z/-]+:(?!latest)[a-z]*[0-9][a-z0-9.-]*", image) is not None


def test_the_image_is_made_in_two_stages_of_the_same_python() -> None:
    assert arguments("FROM") == ["python:3.13-slim AS wheels", "python:3.13-slim"]


def test_the_second_stage_installs_from_the_first_ones_wheels_alone() -> None:
    names = [name for name, _ in instructions()]
    second = instructions()[len(names) - names[::-1].index("FROM") :]
    (pip,) = [rest for name, rest in second if name == "RUN" and "pip" in rest]
    assert "--mount=type=bind,from=wheels" in pip
    assert "--no-index" in pip
    assert not [rest for name, rest in second if "apt" in rest or (name == "COPY" and "--" in rest)]


def test_the_image_needs_no_frontend_of_its_own() -> None:
    assert not re.match(r"#\s*syntax\s*=", (ROOT / "Dockerfile").read_text())


def test_the_images_user_is_a_number_and_not_root() -> None:
    (user,) = arguments("USER")
    assert re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", user)
    assert "RUN" not in [name for name, _ in instructions()[instructions().index(("USER", user)) :]]


def test_the_image_starts_gunicorn_without_a_shell_and_is_stopped_as_gunicorn_expects() -> None:
    assert parsed_command("CMD") == ["gunicorn"]
    assert arguments("STOPSIGNAL") == ["SIGTERM"]
    assert arguments("ENTRYPOINT") == []


def test_the_images_health_check_is_python_that_asks_for_liveness() -> None:
    python, option, code = parsed_command("HEALTHCHECK")
    assert (python, option) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    assert "/healthz" in code


def ignored(path: str) -> bool:
    """Say whether .dockerignore keeps a file out of the build: its last pattern that fits decides.

    A pattern that fits a folder fits all in it.
    """
    answer = False
    parts = [path, *map(str, PurePosixPath(path).parents)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and line[0] != "#" and any(fnmatch(part, line.removeprefix("!")) for part in parts):
            answer = line[0] != "!"
    return answer


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".env",
        ".postgres/password",
        "conftest.py",
        "tests/fixtures.py",
        "docker-compose.yml",
        "requirements-dev.txt",
        "notifier/__pycache__/api.pyc",
        *[str(path.relative_to(ROOT)) for path in (ROOT / "tools").rglob("*.py")],
    ],
)
def test_what_production_does_not_need_is_kept_out_of_the_build(path: str) -> None:
    assert ignored(path)


def test_what_production_needs_is_let_into_the_build() -> None:
    wanted = [ROOT / "requirements.txt", ROOT / "gunicorn.conf.py"]
    wanted += [*(ROOT / "notifier").rglob("*.py"), *(ROOT / "migrations").glob("*.sql")]
    assert len(wanted) > 20
    assert [path for path in wanted if ignored(str(path.relative_to(ROOT)))] == []


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_no_privileges_and_cannot_change_its_files(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "/tmp" in service["tmpfs"]
    assert service.keys().isdisjoint({"cap_add", "privileged", "network_mode", "pid", "devices"})


@pytest.mark.parametrize("name", SERVICES)
def test_a_folder_of_this_machine_can_only_be_read(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source, _, options = volume.rpartition(":")
        assert options == "ro" or source in COMPOSE["volumes"], volume


@pytest.mark.parametrize("name", SERVICES)
def test_every_image_has_a_tag_or_is_built_here(name: str) -> None:
    image = SERVICES[name]["image"]
    if image == SERVICES["notifier"]["image"]:
        assert SERVICES[name]["pull_policy"] == "never"
    else:
        assert tagged(image)


def test_only_the_service_builds_its_image() -> None:
    assert [name for name in SERVICES if "build" in SERVICES[name]] == ["notifier"]


@pytest.mark.parametrize("name", SERVICES)
def test_whatever_keeps_running_has_a_health_check(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    if name in ONE_SHOTS:
        assert check == {"disable": True}
    else:
        assert check["test"][0] == "CMD"
        assert {"interval", "timeout", "start_period"} < check.keys()


def test_the_services_container_is_healthy_when_the_service_is_ready() -> None:
    code = SERVICES["notifier"]["healthcheck"]["test"][-1]
    compile(code, "healthcheck", "exec")
    assert "/readyz" in code


def test_ports_are_published_to_this_machine_alone() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "notifier": [f"{HOME}:8080:8080"],
        "providers": [f"{HOME}:9090-9093:9090-9093"],
        "prometheus": [f"{HOME}:9095:9090"],
        "grafana": [f"{HOME}:3000:3000"],
    }


def test_the_service_starts_after_the_migration_and_stops_before_what_it_calls() -> None:
    conditions = {
        name: wait["condition"] for name, wait in SERVICES["notifier"]["depends_on"].items()
    }
    assert conditions == {
        "migrate": "service_completed_successfully",
        "seed": "service_completed_successfully",
        "providers": "service_healthy",
    }
    assert SERVICES["seed"]["depends_on"] == {"migrate": {"condition": conditions["migrate"]}}
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_only_grafana_has_to_be_asked_for() -> None:
    assert [name for name in SERVICES if "profiles" in SERVICES[name]] == ["grafana"]


def test_the_services_environment_is_one_that_it_takes() -> None:
    environment = dict(SERVICES["notifier"]["environment"])
    assert environment.pop("no_proxy") == "providers"
    Settings.from_env(environment)
    assert {name.lower() for name in environment} <= Settings.__dataclass_fields__.keys()


def test_only_what_migrates_and_seeds_knows_the_role_that_owns() -> None:
    knowing = {name for name, each in SERVICES.items() if "DB_MIGRATION" in json.dumps(each)}
    assert knowing == ONE_SHOTS | {"postgres"}
    postgres = SERVICES["postgres"]["environment"]
    for name in ONE_SHOTS:
        environment = SERVICES[name]["environment"]
        settings = Settings.from_env(environment)
        username, password = settings.migrating_role
        assert (username, password.text) == (
            postgres["POSTGRES_USER"],
            postgres["POSTGRES_PASSWORD"],
        )
        assert username != settings.db_username
        assert password != settings.db_password
        assert (
            environment.items()
            >= {
                variable: value
                for variable, value in SERVICES["notifier"]["environment"].items()
                if variable.startswith("DB_")
            }.items()
        )


def test_a_stopping_container_has_time_for_the_drain_and_for_requests_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = SERVICES["notifier"]["environment"]
    settings = Settings.from_env(environment)
    graceful_timeout = gunicorn_conf(monkeypatch, **environment)["graceful_timeout"]
    stop_grace_period = parse_duration(SERVICES["notifier"]["stop_grace_period"])
    assert (settings.drain_delay, stop_grace_period) == (5, 40)
    assert settings.notify_deadline < graceful_timeout
    assert settings.drain_delay + graceful_timeout < stop_grace_period


def test_the_mock_providers_run_where_their_rows_say() -> None:
    *_, module, service, bind, first, second, third, fourth = SERVICES["providers"]["command"]
    assert (module, bind) == ("tools.dev.sandbox", "--bind=0.0.0.0")
    assert service == "--service=http://notifier:8080"
    assert [first, second, third, fourth] == [f"{mock.name}={mock.port}" for mock in PROVIDERS]
    assert SERVICES["seed"]["command"][-2:] == ["tools.dev.seed", "providers"]


def test_the_database_keeps_its_data_where_its_image_does() -> None:
    assert SERVICES["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"]
    assert "ports" not in SERVICES["postgres"]
