"""The gunicorn worker: its threads share one queue of connections that can be read.

A connection occupies a thread from the arrival of a request's head until the reply is sent. The
main thread accepts connections and closes expired ones, and never waits for a caller.
"""

import errno
import mmap
import os
import selectors
import threading
import time
from contextlib import suppress
from typing import Any

from gunicorn.http import wsgi
from gunicorn.workers import base

from notifier.serving.caller import UNREAD_BODY_SECONDS, BodyReader, Caller
from notifier.serving.listening import plain
from notifier.serving.poller import NOTHING, STOPPED, Poller

# Seconds between checks for expired connections.
LOOK_SECONDS = 1.0

# Seconds that a stopping worker keeps idle connections: a request may be in transit.
LINGER_SECONDS = 2.0

# Seconds after which an idle thread ends: fewer threads compete less for the interpreter.
THREAD_IDLE_SECONDS = 10.0

# Seconds to wait after an accept() that failed for lack of descriptors or memory.
SHORTAGE_SECONDS = 0.5
_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

# Seconds between checks whether a stopping worker has finished.
STOP_LOOK_SECONDS = 0.1


class Worker(base.Worker):
    """A gunicorn worker that starts threads as requests need them, up to `cfg.threads`.

    Shared by all threads: `_connections`, all open connections; `_waiting`, the connections that no
    thread uses, by file descriptor; and, guarded by `_lock`, the numbers of threads and of idle
    threads. The thread that pops a connection from `_waiting` owns it.
    """

    # Set by the master before the fork; both processes share the maps.
    draining: mmap.mmap
    serving: mmap.mmap
    slot: int

    def init_process(self) -> None:
        """Make the state of this process, load the application, and run."""
        self._poller = Poller()
        self._connections: set[Caller] = set()
        self._waiting: dict[int, Caller] = {}
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self._selector = selectors.DefaultSelector()
        self._accepting = False
        self._next_look = 0.0  # when to check for expired connections, on time.monotonic()
        # As plain attributes: reading a setting costs 0.4 us, and the parser reads eighteen.
        vars(self.cfg).update({name: each.get() for name, each in self.cfg.settings.items()})
        super().init_process()

    # --- the main thread

    def run(self) -> None:
        """Serve until a signal arrives or the master ends."""
        self._selector.register(self.PIPE[0], selectors.EVENT_READ, self._wake)
        self._start_thread()
        try:
            while self.alive and self.ppid == os.getppid():
                self.notify()
                self._accept(wanted=len(self._connections) < self.cfg.worker_connections)
                self._wait(LOOK_SECONDS)
                self._close_expired()
            self._finish()
        finally:
            self._poller.stop()

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
            if error.errno in _SHORTAGES:
                self.log.error("cannot accept connections: %s", error.strerror)  # noqa: TRY400 no traceback
                time.sleep(SHORTAGE_SECONDS)
            return
        conn = Caller(self.cfg, sock, plain(client), listener.getsockname())
        self._connections.add(conn)
        conn.expire_after(self.cfg.keepalive)
        self._waiting[conn.fd] = conn
        with suppress(OSError):  # a thread closed it already
            self._poller.add(conn.fd)

    def _close_expired(self) -> None:
        now = time.monotonic()
        if self.alive and now < self._next_look:
            return
        if not self.alive and not self._idle:  # a request may wait for a thread
            return
        self._next_look = now + LOOK_SECONDS
        for conn in list(self._waiting.values()):
            if not self.alive:
                conn.expires = min(conn.expires, now + LINGER_SECONDS)
            if conn.expires < now and self._waiting.pop(conn.fd, None) is not None:
                self._close(conn)

    def _close(self, conn: Caller) -> None:
        self._connections.discard(conn)
        conn.close()
        if not self._accepting:  # the main thread waits for a connection to close
            with suppress(BlockingIOError):
                os.write(self.PIPE[1], b".")

    # --- the threads

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, name="request").start()
        self._threads += 1
        self._idle += 1

    def _work(self) -> None:
        """Serve connections, one after the other."""
        while (fd := self._poller.wait(THREAD_IDLE_SECONDS)) != STOPPED:
            if fd == NOTHING and self._retire():
                return
            conn = self._waiting.pop(fd, None)
            if conn is not None:  # else it expired meanwhile
                self._serve(conn)

    def _serve(self, conn: Caller) -> None:
        with self._lock:
            self._idle -= 1
            if not self._idle and self._threads < self.cfg.threads:
                with suppress(RuntimeError):  # no more threads are available
                    self._start_thread()
        kept = self._attend(conn)
        with self._lock:
            self._idle += 1  # before arming `conn`, or its next request starts a thread
        if kept:
            self._arm(conn)
        else:
            self._close(conn)

    def _retire(self) -> bool:
        """Count this thread as ended and return True, unless no other thread is idle."""
        with self._lock:
            if self._idle == 1:
                return False
            self._idle -= 1
            self._threads -= 1
            return True

    def _attend(self, conn: Caller) -> bool:
        """Read from `conn` and answer a request that is ready; return False to close `conn`."""
        try:
            if conn.leaving:
                conn.drop()
            elif conn.has_head() and not self._answer(conn):
                conn.leave()
        except OSError:
            return False
        except Exception:
            self.log.exception("could not serve a connection")
            return False
        return True

    def _arm(self, conn: Caller) -> None:
        """Let an idle thread attend to `conn` when data arrives."""
        conn.expire_after(self.cfg.keepalive)
        self._waiting[conn.fd] = conn
        with suppress(OSError):  # it expired at once and was closed
            if not conn.leaving and conn.has_read_head():
                self._poller.after_others(conn.fd)
            else:
                self._poller.again(conn.fd)

    def _answer(self, conn: Caller) -> bool:
        """Answer a request; return True if the connection can be reused."""
        request = None
        try:
            request = next(conn.parser)
            if not self._call(request, conn):
                return False
            return conn.end_request(UNREAD_BODY_SECONDS if self._idle else 0.0)
        except (StopIteration, OSError):  # the caller left or was too slow
            return False
        except Exception as error:  # noqa: BLE001 handle_error logs it
            self.handle_error(request, conn.socket, conn.client, error)
            return False

    def _call(self, request: Any, conn: Caller) -> bool:
        """Send the application's reply; return True if the reply keeps the connection open."""
        request.body.reader = BodyReader(request.body.reader)
        reply, environ = wsgi.create(request, conn, conn.client, conn.server, self.cfg)
        environ["wsgi.multithread"] = True
        if self._is_last():
            reply.force_close()
        chunks = self.wsgi(environ, reply.start_response)
        try:
            for chunk in chunks:
                reply.write(chunk)
            reply.close()
        finally:
            if hasattr(chunks, "close"):
                chunks.close()
        conn.flush()
        return not reply.should_close()

    def _is_last(self) -> bool:
        """Count a request; return True if its reply must close the connection."""
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("restarting after %d requests", self.nr)
            self.alive = False
        room = self.cfg.worker_connections - self.cfg.threads
        is_full = len(self._waiting) >= room
        return not self.alive or not self.cfg.keepalive or bool(self.draining[0]) or is_full
