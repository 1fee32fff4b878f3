"""Internals of the pinned gunicorn on which the service relies.

gunicorn documents its settings, its hooks, and that a worker derives from `workers.base.Worker`.
`notifier/serving/` relies on more. The test fails when an upgrade changes any of it.
"""

import hashlib
import inspect
from typing import Any, NamedTuple

import pytest
from gunicorn import glogging, util
from gunicorn.arbiter import Arbiter
from gunicorn.config import Config
from gunicorn.http import body, errors, message, parser, unreader, wsgi
from gunicorn.workers import base, workertmp


class Part(NamedTuple):
    """A part of gunicorn, the digest of its source, and the property on which we rely."""

    code: Any
    digest: str
    holds: str


PARTS = [
    Part(
        base.Worker.__init__,
        "e0f1de2d6057",
        "alive, cfg, log, max_requests, nr, ppid and sockets mean what worker.py assumes",
    ),
    Part(
        workertmp.WorkerTmp.__init__,
        "5d731e1551a9",
        "it makes the heartbeat's file in worker_tmp_dir, and raises OSError if it cannot",
    ),
    Part(
        base.Worker.init_process,
        "114caccd7a0e",
        "it makes PIPE, loads the application, calls post_worker_init, and then run()",
    ),
    Part(
        base.Worker.init_signals,
        "65442e0602b0",
        "a signal makes PIPE[0] readable, which wakes the main thread",
    ),
    Part(
        base.Worker.handle_exit, "e2f7159c426d", "SIGTERM sets alive to False and does nothing else"
    ),
    Part(
        base.Worker.handle_quit,
        "2944b4132761",
        "SIGQUIT raises SystemExit in run(), which then stops the threads",
    ),
    Part(
        base.Worker.handle_error,
        "75426448389b",
        "it logs an error and sends a reply on a non-blocking socket",
    ),
    Part(
        Config.__getattr__,
        "ff80f0fbda2e",
        "instance attributes hide the settings: Worker.init_process copies all settings there",
    ),
    Part(
        parser.Parser.__init__,
        "604084ecb33b",
        "it reads from `unreader`, which caller.py replaces",
    ),
    Part(
        parser.Parser.finish_body,
        "54c5d0d28c26",
        "it sets no time-out on an unreader without `sock`, and stops after max_bytes",
    ),
    Part(
        parser.Parser.__next__,
        "b8536520e958",
        "it parses one request, and reads nothing of the next one",
    ),
    Part(
        unreader.Unreader,
        "84aaa8f91fcd",
        "`buf` holds the unparsed bytes, and only chunk() reads more",
    ),
    Part(
        message.Request.parse,
        "34c084607ae1",
        "it reads only from the unreader, and reads no more once has_read_head() is True",
    ),
    Part(
        message.Request._parse_python,
        "ed07ffec5178",
        "it refuses bare line feeds without reading more",
    ),
    Part(
        body.Body._read_reader,
        "443e7cfab4b8",
        "it calls `reader.read(size)`, which BodyReader replaces, and remembers a failure",
    ),
    Part(wsgi.create, "2c35d4a2dc62", 'it sends "100 Continue" through send(), and nothing else'),
    Part(
        wsgi.Response,
        "d67f8e6b29d7",
        "it writes only through sendall(); force_close() before the head closes the connection",
    ),
    Part(util.write, "cd995031295f", "it calls only sendall()"),
    Part(util.write_error, "bd0143a03c15", "it works on a non-blocking socket"),
    Part(util.write_nonblock, "d2ff97701c36", "write_error calls it: it never waits"),
    Part(
        wsgi.default_environ,
        "b7e18b84d829",
        "it sets wsgi.input_terminated",
    ),
    Part(
        message.Message.should_close,
        "37c454bfb3e3",
        "it says whether the caller wants the connection closed",
    ),
    Part(errors.NoMoreData, "549d75f9be34", "it is an OSError, as for a caller that has left"),
    Part(Arbiter.reload, "fec344d2f774", "it starts num_workers workers, then manages them"),
    Part(Arbiter.stop, "7138b6afd9c4", "it ends the workers within graceful_timeout"),
    Part(
        Arbiter.__init__,
        "53b20d752bbb",
        "reexec_pid, master_pid and num_workers mean what master.py assumes",
    ),
    Part(glogging.Logger.__init__, "508cb885e4c0", "it makes error_log and calls setup()"),
    Part(
        Arbiter.handle_term,
        "93d583480a66",
        "it stops the master by raising StopIteration, so _drain never goes on after stop()",
    ),
    Part(Arbiter.handle_hup, "50de80005cd6", "it reloads, and nothing else"),
    Part(
        Arbiter.manage_workers,
        "518f2dd040ef",
        "it starts missing workers and ends the oldest superfluous ones",
    ),
    Part(
        Arbiter.spawn_worker,
        "6abc0d90b0b9",
        "it forks one worker, adds it to WORKERS, and calls pre_fork and post_fork",
    ),
    Part(
        Arbiter.reap_workers,
        "ebcf4187e9eb",
        "it removes ended workers from WORKERS and calls child_exit",
    ),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.code.__qualname__)
def test_gunicorn_is_as_the_service_expects(part: Part) -> None:
    digest = hashlib.sha256(inspect.getsource(part.code).encode()).hexdigest()
    name = f"{part.code.__module__}.{part.code.__qualname__}"
    advice = f"gunicorn has changed {name}: check that {part.holds}; then put {digest[:12]} here"
    assert digest.startswith(part.digest), advice
