"""A stand-in for the Hugging Face hub on this machine, which can fail in the ways that the real one does."""

import hashlib
import json
import re
import socket
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

INFO = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)")
RESOLVE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<commit>[0-9a-f]{40})/(?P<name>.+)")
STEP = 1 << 18  # bytes between two pauses


@dataclass(frozen=True)
class Fault:
    """How one response differs from what it should be."""

    status: int = 0
    stop_after: int | None = None  # bytes, and then the connection is reset
    promised: bool = True  # with stop_after: the length that was promised is the whole one
    instead: bytes | None = None
    whole: bool = False  # the range that was asked for is ignored
    pause: float = 0.0  # seconds, before every STEP bytes


class Server(ThreadingHTTPServer):
    """Says nothing of clients that go away, which is what the tests have them do."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """Serves repositories; `faults` holds what is to go wrong with each file (or "info"), in order."""

    def __init__(self) -> None:
        self.revisions: dict[tuple[str, str], Mapping[str, bytes]] = {}
        self.faults: dict[str, Iterator[Fault]] = defaultdict(lambda: iter(()))
        self.requests: list[tuple[str, str]] = []  # file or "info", Range
        self.sent: dict[str, int] = defaultdict(int)
        self._server = Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Ends it."""
        self._server.shutdown()
        self._server.server_close()

    def asked(self) -> list[str]:
        """The files that were asked for, and "info", in order."""
        return [name for name, _ in self.requests]

    def info(self, repository: str, revision: str) -> dict[str, Any] | None:
        """What the hub's API tells of a repository."""
        files = self.revisions.get((repository, revision))
        if files is None:
            return None
        siblings = []
        for name, data in files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if kept_by_lfs(name):
                entry["blobId"] = "0" * 40  # of the pointer
                entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
            siblings.append(entry)
        return {"id": repository, "sha": commit(repository, revision), "siblings": siblings}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                if parts := INFO.fullmatch(path):
                    hub.requests.append(("info", ""))
                    fault = next(hub.faults["info"], Fault())
                    info = hub.info(parts["repository"], parts["revision"])
                    self._send("info", json.dumps(info).encode(), fault if info else Fault(status=404))
                elif path.startswith("/cdn/") and (parts := RESOLVE.fullmatch(path.removeprefix("/cdn"))):
                    self._send_file(parts)
                elif parts := RESOLVE.fullmatch(path):
                    if not kept_by_lfs(parts["name"]):
                        return self._send_file(parts)
                    self.send_response(302)
                    self.send_header("Location", f"{hub.url}/cdn{path}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                else:
                    self._send("info", b"", Fault(status=404))

            def _send_file(self, parts: re.Match[str]) -> None:
                name = parts["name"]
                hub.requests.append((name, self.headers.get("Range", "")))
                served = (
                    files
                    for (repository, revision), files in hub.revisions.items()
                    if repository == parts["repository"] and commit(repository, revision) == parts["commit"]
                )
                self._send(name, next(served)[name], next(hub.faults[name], Fault()))

            def _send(self, name: str, data: bytes, fault: Fault) -> None:
                if fault.status:
                    self.send_response(fault.status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = data if fault.instead is None else fault.instead
                start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
                start = 0 if fault.whole else start
                body = data[start:] if fault.stop_after is None else data[start : start + fault.stop_after]
                self.send_response(206 if "Range" in self.headers and not fault.whole else 200)
                self.send_header("Content-Length", str(len(data) - start if fault.promised else len(body)))
                self.end_headers()
                for position in range(0, len(body), STEP):
                    time.sleep(fault.pause)
                    self.wfile.write(body[position : position + STEP])
                    hub.sent[name] += STEP
                if fault.stop_after is not None and fault.promised:
                    time.sleep(0.1)  # until it has been read: a reset throws away what has not
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def commit(repository: str, revision: str) -> str:
    """The commit that a revision stands for."""
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


def kept_by_lfs(name: str) -> bool:
    """Whether a file is so large that git keeps a pointer to it."""
    return name.endswith((".safetensors", ".bin", ".model"))
