"""The gunicorn worker: its threads share one queue of connections that can be read.

A connection occupies a thread from the arrival of a whole request until the reply is sent. The
main thread accepts connections and closes expired ones, and never waits for a caller.
"""

import itertools
import logging
import mmap
import os
import selectors
import time
from contextlib import suppress
from typing import Any

from gunicorn.http import wsgi
from gunicorn.http.errors import ParseException
from gunicorn.workers import base

from notifier.errors import is_shortage
from notifier.logs import OncePerSecond
from notifier.serving.caller import IDLE_SECONDS, BodyReader, Caller
from notifier.serving.listening import plain
from notifier.serving.poller import STOPPED
from notifier.serving.refusals import Refusal, placeholder
from notifier.serving.turns import Turn, Turns

# Seconds between checks for expired connections.
LOOK_SECONDS = 1.0

# Seconds that a stopping worker keeps idle connections: a request may be in transit.
LINGER_SECONDS = 2.0

# Maximum bytes of incomplete requests in a worker, and the bytes of one that count as large.
MAX_HELD_BYTES = 32 * 1024 * 1024
LARGE_BYTES = 32 * 1024

# Seconds without accepting connections after a lack of descriptors or memory.
SHORTAGE_SECONDS = 0.5

# Seconds between checks whether a stopping worker has finished.
STOP_LOOK_SECONDS = 0.1

log = logging.getLogger(__name__)


class Worker(base.Worker):
    """A gunicorn worker that starts threads as requests need them, up to `cfg.threads`.

    Shared by all threads: `_connections`, all open connections, and `_waiting`, the connections
    that no thread uses, by file descriptor. The thread that pops a connection from `_waiting` owns
    it.
    """

    # Set by the master before the fork; both processes share the maps.
    draining: mmap.mmap
    serving: mmap.mmap
    slot: int

    def init_process(self) -> None:
        """Make the state of this process, load the application, and run."""
        self._turns = Turns(self.cfg.threads, self._work, self._rank)
        self._connections: set[Caller] = set()
        self._waiting: dict[int, Caller] = {}
        self._selector = selectors.DefaultSelector()
        self._accepting = False
        # Connections to close when so few more would fill the worker.
        self._margin = max(1, min(self.cfg.threads, self.cfg.worker_connections // 4))
        self._is_crowded = False  # no connection was idle when one had to be closed
        self._accept_from = 0.0  # when to accept connections again, on time.monotonic()
        self._shortages = OncePerSecond()
        self._next_look = 0.0  # when to check for expired connections, on time.monotonic()
        # As plain attributes: reading a setting costs 0.4 us, and the parser reads eighteen.
        vars(self.cfg).update({name: each.get() for name, each in self.cfg.settings.items()})
        super().init_process()

    # --- the main thread

    def run(self) -> None:
        """Serve until a signal arrives or the master ends."""
        self._selector.register(self.PIPE[0], selectors.EVENT_READ, self._wake)
        self._turns.start()
        try:
            while self.alive and self.ppid == os.getppid():
                self.notify()
                if self._is_full():
                    self._make_room()
                self._accept(wanted=not self._is_full() and time.monotonic() >= self._accept_from)
                self._wait(LOOK_SECONDS if self._accepting else IDLE_SECONDS)
                self._close_expired()
            self._finish()
        finally:
            self._turns.stop()

    def _finish(self) -> None:
        """Stop accepting connections, and finish the requests under way."""
        self.alive = False
        self._accept(wanted=False)
        give_up = time.monotonic() + self.cfg.graceful_timeout
        while self._connections and time.monotonic() < give_up:
            self.notify()
            self._wait(STOP_LOOK_SECONDS)
            self._close_expired()
        for listener in self.sockets:
            listener.close()

    def _is_full(self) -> bool:
        most: int = self.cfg.worker_connections
        return len(self._connections) >= most

    def _accept(self, *, wanted: bool) -> None:
        """Start or stop accepting connections."""
        if wanted == self._accepting:
            return
        self._accepting = wanted
        for listener in self.sockets:
            if wanted:
                listener.setblocking(False)
                self._selector.register(listener, selectors.EVENT_READ, self._connect)
            else:
                self._selector.unregister(listener)

    def _wait(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            key.data(key.fileobj)

    def _wake(self, pipe: int) -> None:
        """Empty the pipe that signals and `_close` write to."""
        os.read(pipe, 4096)

    def _connect(self, listener: Any) -> None:
        try:
            sock, client = listener.accept()
        except OSError as error:  # usually another worker took it, or the caller left
            if is_shortage(error):
                if times := self._shortages.times(error.errno):
                    fields = {"reason": error.strerror, "times": times}
                    log.error("connection not accepted", extra=fields)  # noqa: TRY400 no traceback
                self._accept_from = time.monotonic() + SHORTAGE_SECONDS
                self._make_room()
            return
        if len(self._connections) >= self.cfg.worker_connections - self._margin:
            self._make_room()
        conn = Caller(self.cfg, sock, plain(client), listener.getsockname())
        self._connections.add(conn)
        self._waiting[conn.fd] = conn
        with suppress(OSError):  # a thread closed it already
            self._turns.poller.add(conn.fd)

    def _make_room(self) -> None:
        """Close the connections that have been idle for longest, up to the margin.

        `_waiting` has them in the order of their last activity.
        """
        idle = (conn for conn in list(self._waiting.values()) if conn.is_idle())
        self._is_crowded = True
        for conn in itertools.islice(idle, self._margin):
            self._is_crowded = False
            if self._waiting.pop(conn.fd, None) is not None:
                self._close(conn)

    def _close_expired(self) -> None:
        now = time.monotonic()
        if self.alive and now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        self._turns.look()
        if not self.alive and not self._turns.idle:  # a request may wait for a thread
            return
        for conn in list(self._waiting.values()):
            if not self.alive:
                conn.expires = min(conn.expires, now + LINGER_SECONDS)
            if conn.has_expired(now) and self._waiting.pop(conn.fd, None) is not None:
                self._expire(conn)

    def _expire(self, conn: Caller) -> None:
        """Close `conn`, or let a thread refuse its request if only the body is late."""
        if conn.give_up():
            self._arm(conn)
        else:
            self._close(conn)

    def _close(self, conn: Caller) -> None:
        self._connections.discard(conn)
        conn.close()
        if not self._accepting:  # the main thread waits for a connection to close
            with suppress(BlockingIOError):
                os.write(self.PIPE[1], b".")

    # --- the threads

    def _work(self) -> None:
        """Serve connections, one after the other."""
        while (fd := self._turns.take()) != STOPPED:
            turn = Turn(self._turns)
            conn = self._waiting.pop(fd, None)
            kept = conn is not None and self._attend(conn, turn)
            turn.end()
            if conn is None:  # it expired meanwhile
                continue
            if kept and not self._is_too_much(conn):
                self._arm(conn)
            else:
                self._close(conn)

    def _is_too_much(self, conn: Caller) -> bool:
        """Return True if incomplete requests take too much memory, and `conn` a lot of it."""
        if conn.held < LARGE_BYTES:
            return False
        return conn.held + sum(other.held for other in [*self._waiting.values()]) > MAX_HELD_BYTES

    def _rank(self, fd: int) -> float:
        conn = self._waiting.get(fd)
        return conn.arrival().rank if conn else 0.0  # it expired meanwhile

    def _attend(self, conn: Caller, turn: Turn) -> bool:
        """Read from `conn` and answer a request that is ready; return False to close `conn`."""
        try:
            if conn.leaving:
                conn.drop()
            elif not self._answer(conn, turn):
                conn.leave()
        except OSError:
            return False
        except Exception:
            self.log.exception("could not serve a connection")
            return False
        return True

    def _arm(self, conn: Caller) -> None:
        """Let an idle thread attend to `conn` when data arrives, or soon if a request has."""
        self._waiting[conn.fd] = conn
        with suppress(OSError):  # it expired at once and was closed
            if not conn.leaving and conn.has_request():
                self._turns.poller.after_others(conn.fd)
            else:
                self._turns.poller.again(conn.fd)

    def _answer(self, conn: Caller, turn: Turn) -> bool:
        """Answer a request that has arrived; return True if the connection can be reused."""
        try:
            request = conn.receive()
            if request is None:
                return True
            return self._call(request, conn, turn) and conn.end_request()
        except OSError:  # the caller left
            raise
        except Exception as error:
            if not isinstance(error, ParseException):
                self.log.exception("could not serve a request")
            conn.discard()
            self._call(placeholder(self.cfg, conn.client), conn, turn, Refusal.of(error))
            return False

    def _call(self, request: Any, conn: Caller, turn: Turn, refusal: Refusal | None = None) -> bool:
        """Send the application's reply; return True if the reply keeps the connection open."""
        request.body.reader = BodyReader(request.body.reader)
        reply, environ = wsgi.create(request, conn, conn.client, conn.server, self.cfg)
        environ["wsgi.multithread"] = True
        turn.arrival = conn.arrival()
        environ["notifier.turn"] = turn
        environ["notifier.refusal"] = refusal
        self._count()
        chunks = self.wsgi(environ, reply.start_response)
        if not self._keeps(conn):
            reply.force_close()
        try:
            for chunk in chunks:
                reply.write(chunk)
            reply.close()
        finally:
            if hasattr(chunks, "close"):
                chunks.close()
        conn.flush(turn.wait)
        return not reply.should_close()

    def _count(self) -> None:
        """Count a request, and let the worker end with it if it was the last."""
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("restarting after %d requests", self.nr)
            self.alive = False

    def _keeps(self, conn: Caller) -> bool:
        """Return True if `conn` may be kept after the reply."""
        is_stopping = not self.alive or bool(self.draining[0])
        return (
            bool(self.cfg.keepalive) and conn.is_whole() and not is_stopping and not self._is_full()
        )
