"""A hub on loopback: what huggingface_hub asks the real one for when it fetches a dataset file, and its failures."""

import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def parquet_bytes(texts: list[str], column: str = "text", rows: int = 4) -> bytes:
    """A parquet file with one column of strings."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({column: texts}), buffer, row_group_size=rows)
    return buffer.getvalue()


class StandInHub:
    """`files` is what a repository holds; `faults[name]` are met one after the other by GETs of that file.

    A fault is a status to answer with, "cut" (half the body, then the connection closes), or "html" (a login page).
    Large files are redirected as the real hub does; their ETag is their sha256.
    """

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        self.repo = repo
        self.files = files
        self.faults: dict[str, list[int | str]] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, file, Range
        self.revisions: set[str] = set()
        self.moved: dict[str, str] = {}  # beginning of a path -> where it sends on to
        self.authorizations: set[str] = set()  # that came with requests to the hub itself
        self.plain = False  # a mirror without the hub's headers and redirects
        self.url = ""

    def gets(self, name: str) -> int:
        return sum(method == "GET" and file == name for method, file, _ in self.requests)


@contextmanager
def serving(hub: StandInHub) -> Iterator[StandInHub]:
    """Serve `hub` on a free port of loopback; its address is `hub.url`."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
                if not (hub.plain and key.startswith("X")):
                    self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            repo, _, rest = self.path.partition("/resolve/")
            for old, new in hub.moved.items():
                if self.path.startswith(old):
                    return self.answer(302, Location=new)
            if self.path.startswith("/cdn/"):
                return self.content(self.path.removeprefix("/cdn/"))
            if repo != f"/datasets/{hub.repo}":
                return self.answer(404, X_Error_Code="RepoNotFound")
            if "Authorization" in self.headers:
                hub.authorizations.add(self.headers["Authorization"])
            revision, _, name = rest.partition("/")
            hub.revisions.add(revision)
            if revision not in ("main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if name not in hub.files:
                return self.answer(404, X_Error_Code="EntryNotFound")
            body = hub.files[name]
            if hub.plain:
                return self.content(name)
            if self.command == "HEAD":
                hub.requests.append(("HEAD", name, None))
            self.answer(
                302,
                Location=f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{name}",  # another host, as in life
                X_Linked_Size=str(len(body)),
                X_Linked_Etag=f'"{hashlib.sha256(body).hexdigest()}"',
            )

        def content(self, name: str) -> None:
            wanted = self.headers.get("Range")
            with lock:
                hub.requests.append((self.command, name, wanted))
                fault = hub.faults[name].pop(0) if self.command == "GET" and hub.faults.get(name) else None
            body = hub.files[name]
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            if isinstance(fault, int):
                self.answer(fault)
            elif fault == "html":
                self.answer(200, b"<!DOCTYPE html><title>Sign in to this network</title>".ljust(len(body)))
            elif fault == "cut":
                self.close_connection = True
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
            else:
                self.answer(206 if wanted else 200, body[start:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
