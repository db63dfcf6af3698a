"""Uvicorn with deadlines and a bound for connections, which it has no settings for."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

# Seconds that open requests get to end after a signal to stop.
SHUTDOWN_SECONDS = 60
# For clients that connected before the signal and have not sent a request yet.
_GRACE_SECONDS = 0.5
# After that, for clients that are slow to send a body or to read an answer.
_STOPPING_SECONDS = 3.0


class Server(uvicorn.Server):
    """Stops in an order that loses no request, and without dying of the signal."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or []:
            log.info("listening on http://%s:%d", *sock.getsockname()[:2])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Who waits to be accepted would be cut off when the last descriptor is closed.
        spare = [sock.dup() for sock in sockets or []]
        for server in self.servers:
            server.close()
        for connection in _accept_waiting(spare):
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(self._protocol, connection)
        await asyncio.sleep(_GRACE_SECONDS)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        state, app_state = self.server_state, self.lifespan.state
        return make(config=self.config, server_state=state, app_state=app_state)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        if threading.current_thread() is threading.main_thread():
            # Uvicorn raises the signal again when it has stopped.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
        super().run(sockets)


def _accept_waiting(listening: list[socket.socket]) -> list[socket.socket]:
    """Returns the connections that wait to be accepted, and closes the sockets."""
    found = []
    for sock in listening:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(sock.accept()[0])
        sock.close()
    return found


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with time limits for its clients, which `make_server` sets."""

    max_connections: int
    header_seconds: float
    write_seconds: float
    deadline: asyncio.TimerHandle | None = None
    write_deadline: asyncio.TimerHandle | None = None
    stopping = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            log.warning("closed a connection: more than %d are open", self.max_connections)
            transport.abort()
            return
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        if self.write_deadline is not None:
            self.write_deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._stop_clock()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_reading()
        if self.cycle is None or self.cycle.response_complete:
            self._expect_header()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def shutdown(self) -> None:
        """Ends the connection when its request is answered; the client has no say."""
        self.stopping = True
        super().shutdown()
        self._expect_reading(anew=True)
        self.loop.call_later(_STOPPING_SECONDS, self._expect_body)

    def _expect_body(self) -> None:
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()

    def _expect_reading(self, anew: bool = False) -> None:
        """Starts the clock of an answer that waits in the buffer, unless it runs."""
        if self.write_deadline is not None:
            if not anew:
                return
            self.write_deadline.cancel()
            self.write_deadline = None
        if self.transport.get_write_buffer_size():
            stopping = _STOPPING_SECONDS if self.stopping else self.write_seconds
            seconds = min(self.write_seconds, stopping)
            self.write_deadline = self.loop.call_later(seconds, self._check_read, self.cycle)

    def _check_read(self, cycle: Any) -> None:
        self.write_deadline = None
        if cycle is not self.cycle:  # another answer by now, with a clock of its own
            self._expect_reading()
        elif self.transport.get_write_buffer_size():
            log.warning("closed a connection: its client did not read the answer")
            self.transport.abort()

    def _expect_header(self) -> None:
        self._stop_clock()
        self.deadline = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _stop_clock(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


def make_server(
    app: Any, *, max_connections: int, header_seconds: float, write_seconds: float = 30.0
) -> Server:
    """Returns the server; its `run(sockets=[...])` returns after SIGTERM or SIGINT.

    Args:
      max_connections: one more is closed at once.
      header_seconds: within which a connection must have sent a request's header; also
        how long one may be idle between two.
      write_seconds: within which a client must have read an answer.
    """
    limits = {
        "max_connections": max_connections,
        "header_seconds": header_seconds,
        "write_seconds": write_seconds,
    }
    config = uvicorn.Config(
        app,
        http=type("LimitedProtocol", (BoundedProtocol,), limits),  # Uvicorn makes them
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        timeout_keep_alive=int(header_seconds) or 1,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return Server(config)


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket with an address, not listening yet; port 0 takes a free one.

    Raises:
      ValueError: naming the address that cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ValueError(
            f"--host={host} --port={port}: cannot listen there ({error.strerror}); "
            "give another port, or 0 for a free one"
        ) from error
    return sock
