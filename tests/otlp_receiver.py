# SPDX-License-Identifier: GPL-3.0-or-later
"""A collector of OpenTelemetry: takes spans over OTLP/HTTP, as the real ones do, and shows them to the test."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True)
class Span:
    """A span as it arrived."""

    name: str
    trace_id: str
    parent_id: str
    attributes: dict[str, Any]
    service: str


class OtlpReceiver:
    """Collects spans."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._spans: list[Span] = []
        self._changed = threading.Condition()

    def add(self, body: bytes) -> None:
        """Take a request in."""
        request = ExportTraceServiceRequest.FromString(body)
        found = []
        for resource in request.resource_spans:
            service = _values(resource.resource.attributes).get("service.name", "")
            for scope in resource.scope_spans:
                found += [
                    Span(span.name, span.trace_id.hex(), span.parent_span_id.hex(), _values(span.attributes), service)
                    for span in scope.spans
                ]
        with self._changed:
            self._spans += found
            self._changed.notify_all()

    def wait_for(self, is_wanted: Callable[[Span], bool], seconds: float = 30) -> Span:
        """Wait for a span."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(map(is_wanted, self._spans)), seconds), self._spans
            return next(filter(is_wanted, self._spans))

    @property
    def names(self) -> list[str]:
        """Name all spans that arrived."""
        with self._changed:
            return [span.name for span in self._spans]


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    """Run a collector on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.add(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            """Write nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = OtlpReceiver(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _values(attributes: Any) -> dict[str, Any]:
    return {
        item.key: item.value.int_value if item.value.HasField("int_value") else item.value.string_value
        for item in attributes
    }
