"""nanochat.hf.push, and an import by name, against a stand-in for the hub on loopback: what huggingface_hub asks for to
send a folder, and to get it."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants

from nanochat.checkpoint import load_model
from nanochat.errors import UserError
from nanochat.hf.push import push
from scripts import export_hf, import_hf

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """`files`: what it was sent; `refuses`: answers every request with this status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}  # by sha256
        self.repos: dict[str, bool] = {}  # name -> private
        self.tokens: set[str | None] = set()
        self.refuses = 0


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def do_PUT(self) -> None:
        self.server.stored[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        asked, _, name = path.partition("/resolve/")
        owner, repo, *more = asked.removeprefix("/api/models").strip("/").split("/")
        if hub.refuses:
            return self.answer({"error": "no"}, hub.refuses)
        if f"{owner}/{repo}" not in hub.repos:
            return self.answer({"error": "none"}, 404, X_Error_Code="RepoNotFound")
        hub.tokens.add(self.headers.get("Authorization"))
        if name:
            return self.send(hub.files[name.partition("/")[2]], X_Repo_Commit=COMMIT, ETag=f'"{name}"')
        if more[:1] == ["tree"]:
            found = hub.files.items()
            return self.answer([{"type": "file", "path": p, "size": len(b), "oid": "2" * 40} for p, b in found])
        self.answer({"id": f"{owner}/{repo}", "sha": COMMIT, "siblings": []})

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuses:
            return self.answer({"error": "no"}, hub.refuses)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            hub.repos[f"{asked['organization']}/{asked['name']}"] = "private" in (asked.get("visibility"), *asked)
            return self.answer({"url": f"{hub.url}/me/{asked['name']}"})
        if self.path == "/api/validate-yaml":  # of the model card
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            kinds = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in asked}
            shown = [{"path": path, "uploadMode": kind, "shouldIgnore": False} for path, kind in kinds.items()]
            return self.answer({"files": shown})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**found, "actions": {"upload": {"href": f"{hub.url}/store/{found['oid']}"}}}
                for found in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        assert "/commit/" in self.path, self.path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.stored[value["oid"]]
        self.answer({"commitUrl": f"{hub.url}/me/m/commit/1", "commitOid": "1" * 40, "success": True})


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield hub
    hub.shutdown()
    hub.server_close()


def test_all_files_arrive(hub, exports, capsys):
    _, folder = exports("speedrun")
    push(folder, "me/m", dry_run=False)
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.repos == {"me/m": True} and hub.tokens == {"Bearer hf_secret"}
    push(folder, "me/m", dry_run=False)  # once more, into what is there
    assert "sent to" in capsys.readouterr().out


def test_what_was_sent_is_imported_by_its_name(hub, exports, store, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model, folder = exports("speedrun")
    push(folder, "me/m", dry_run=False)
    import_hf.main(import_hf.Settings("me/m", model_tag="theirs"))
    again, _, meta = load_model("sft", torch.device("cpu"), tag="theirs")
    assert again.config == model.config and meta["step"] == 7
    for (name, found), wanted in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(found, wanted), name
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("source", "refuses", "message"),
    [
        ("me/none", 0, "could not get me/none from the hub"),
        ("me/m", 401, "check the name, HF_TOKEN and HF_ENDPOINT"),
        ("me/m", 500, "could not get me/m from the hub"),
        ("me/a..b", 0, "could not get me/a..b from the hub"),
        ("me/nowhere", -1, "could not get me/nowhere from the hub"),
    ],
)
def test_what_cannot_be_had_from_the_hub(source, refuses, message, hub, store, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.refuses = max(0, refuses)
    if refuses < 0:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=message) as caught:
        import_hf.main(import_hf.Settings(source))
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_dry_run_asks_nobody(hub, exports, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    _, folder = exports("speedrun")
    export_hf.main(export_hf.Settings(out=folder, push="me/m"))
    out = capsys.readouterr().out
    assert "MB  model.safetensors" in out and f"would go to {hub.url}/me/m; add --no-dry-run" in out
    assert not hub.tokens and not hub.repos


def test_what_cannot_be_sent(hub, exports, tmp_path, monkeypatch):
    _, folder = exports("speedrun")
    with pytest.raises(UserError, match="is no export"):
        push(tmp_path, "me/m")
    with pytest.raises(UserError, match="--push=a/b/c: expected OWNER/NAME"):
        push(folder, "a/b/c", dry_run=False)
    for status, hint in ((403, "check HF_TOKEN"), (400, "HTTP 400")):
        hub.refuses = status
        with pytest.raises(UserError, match=hint) as caught:
            push(folder, "me/m", dry_run=False)
        assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN is not set"):
        push(folder, "me/m", dry_run=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="could not send to"):
        push(folder, "me/m", dry_run=False)
