"""A search server that misbehaves. Whatever it does must end in one line that names the server,
never in an observation for the model."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = Path(__file__).resolve().parents[2] / ".assets" / "test" / "faulty_servers.json"
FAULTS = json.loads(FAULTS.read_text())  # {kind: {"status", "body", "times": it is repeated, ...}}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        """Answer as the server's fault says; `missing` bytes are promised and do not come."""
        fault = self.server.fault
        body = (fault["body"] * fault.get("times", 1)).encode()
        request = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(json.loads(request))
        threading.Event().wait(fault.get("tenths_of_a_second", 0) / 10)
        self.send_response(fault["status"])
        self.send_header("Content-Length", str(len(body) + fault.get("missing", 0)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def faulty_server(kind):
    """Around a running server: (its url, the list of requests that come)."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.fault, server.requests = FAULTS[kind], []
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        port = server.fault.get("port", server.server_port)
        yield f"http://127.0.0.1:{port}/retrieve", server.requests
        server.shutdown()
