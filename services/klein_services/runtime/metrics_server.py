"""HTTP server of the metrics port: `/metrics` for Prometheus and `/healthz` for load balancers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import prometheus_client


class MetricsServer:
    """Answers on its own threads as soon as it is made, in every state of the server.

    Args:
        host: an address to listen on.
        port: a port of it; 0 is a free one.
        is_serving: whether `/healthz` answers 200; called on the threads.

    Raises:
        OSError: the port is taken or not allowed.
    """

    def __init__(self, host: str, port: int, is_serving: Callable[[], bool]) -> None:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]

        class Server(_ThreadingServer):
            address_family = family

        self._server = make_server(str(address[0]), port, _application(is_serving), Server, _SilentHandler)
        self.port = int(self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _application(is_serving: Callable[[], bool]) -> WSGIApplication:
    metrics_page = prometheus_client.make_wsgi_app()

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            page: Iterable[bytes] = metrics_page(environ, start_response)
            return page
        if path != "/healthz":
            status, text = "404 Not Found", "not found; there are /metrics and /healthz\n"
        elif is_serving():
            status, text = "200 OK", "serving\n"
        else:
            status, text = "503 Service Unavailable", "not serving\n"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [text.encode()]

    return answer


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    """A thread for each request, none of which keeps the process alive."""

    daemon_threads = True


class _SilentHandler(WSGIRequestHandler):
    """Logs nothing: probes would drown everything else."""

    def log_message(self, format: str, *args: Any) -> None:
        """Drops the line."""
