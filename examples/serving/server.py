"""Answer requests with an exported model. Standard library and PyTorch only."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


def handler(run: Any) -> type[BaseHTTPRequestHandler]:
    """Return a handler that answers POST requests `{"inputs": [[…], …]}` with `run`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                x = torch.tensor(body["inputs"], dtype=torch.float32)
                with torch.no_grad():
                    scores, converged = run(x)
            except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
                self._answer(400, {"error": f"{type(error).__name__}: {error}"})
            else:
                self._answer(200, {"scores": scores.tolist(), "converged": converged.tolist()})

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Write no line per request."""

    return Handler


def main(path: str, port: int) -> None:
    """Serve until interrupted, and print the port."""
    server = ThreadingHTTPServer(("127.0.0.1", port), handler(torch.export.load(path).module()))
    print(f"serving on port {server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8000)
