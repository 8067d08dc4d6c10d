import importlib.util
import os
import socket
import subprocess
import sys
import time
from base64 import b64decode

import pytest
from huggingface_hub import close_session, constants

from nanochat.data import hub
from nanochat.errors import UserError
from tests.standin_hub import COMMIT, StandInHub, parquet_bytes, serving

REPO, NAME = "someone/texts", "shard_00000.parquet"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.001)
    with serving(
        StandInHub(REPO, {NAME: parquet_bytes([f"text {i} " + os.urandom(200).hex() for i in range(100)])})
    ) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        yield server


def get(path, name=NAME, repo=REPO, revision="main", verify=lambda _: None, **options):
    return hub.download(repo, name, revision, path, verify, otherwise="use --source=pydocs", **options)


def assert_only(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_a_file_arrives_whole(server, tmp_path):
    progress = []
    commit = get(tmp_path / "deep" / NAME, on_bytes=lambda done, total: progress.append((done, total)))
    size = len(server.files[NAME])
    assert (tmp_path / "deep" / NAME).read_bytes() == server.files[NAME]
    assert commit == COMMIT
    assert progress[-1] == (size, size)
    assert server.revisions == {"main", COMMIT}  # described at the branch, fetched at the commit
    assert_only(tmp_path / "deep", NAME)


def test_endpoint_is_read_at_call_time(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert hub.endpoint() == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:8080/")
    assert hub.endpoint() == "http://mirror.example:8080"
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    with pytest.raises(UserError, match=r"HF_ENDPOINT=mirror\.example: expected"):
        hub.endpoint()


PASSWORD = "s3cret"


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("HF_ENDPOINT", "http://me:secret@mirror:99999", "HF_ENDPOINT: not all of these variables can be used"),
        ("HF_ENDPOINT", "http://[::1", "HF_ENDPOINT: not all of these variables can be used"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "1 min", "HF_HUB_DOWNLOAD_TIMEOUT: not all of these variables can be used"),
        ("HF_TOKEN", "hf_tökén", "HF_TOKEN, or what `hf auth login` has kept, has letters that are no ASCII"),
    ],
)
def test_settings_that_the_hubs_client_chokes_on_are_one_line(tmp_path, name, value, said):
    """In a new process: some of them as the client is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "nanochat.dataset", "-n", "1"],
        env={**kept, "NANOCHAT_BASE_DIR": str(tmp_path), name: value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
    assert "secret" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "address",
    ["mirror.example", "ftp://mirror", "https://", "http://[bad", "http://host:abc", "http://host:99999", "http://a b/",
     "http://host/\x01", "http://....", f"http://{'a' * 300}", "https://host/?token=s3cret", "http://u:s3cret@host:x",
     "http://u:s3/cret@h ost", "http://u:p s3cret@host", "u:s3cret@host", "u:x@s3cret@host:80/y"],
)  # fmt: skip
def test_an_endpoint_that_is_no_address_is_one_line_at_once(monkeypatch, tmp_path, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UserError, match=r"^HF_ENDPOINT=.*: expected an address") as caught:
        get(tmp_path / NAME)
    assert PASSWORD not in str(caught.value) and "s3/cret" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["http://[::1]:80", "HTTPS://Mirror.example/", " http://é.example/x/ ", "http://a_b:1"]
)
def test_unusual_addresses_are_taken(monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert hub.endpoint() == address.strip().rstrip("/")


@pytest.fixture
def no_proxies(monkeypatch):
    close_session()
    for name in ("http", "https", "all", "no"):
        for spelt in (f"{name}_proxy", f"{name}_proxy".upper()):
            monkeypatch.delenv(spelt, raising=False)
    yield
    close_session()


@pytest.mark.parametrize("name", ["ALL_PROXY", "all_proxy", "HTTPS_PROXY", "http_proxy"])
@pytest.mark.parametrize(
    "address",
    ["socks5://127.0.0.1:1", "socks://u:s3cret@h:1", "ftp://h:1", "http://h:abc", "http://[bad", "http://",
     "u:s3cret@h:99999"],
)  # fmt: skip
@pytest.mark.usefixtures("no_proxies")
def test_a_proxy_that_cannot_be_used_is_one_line_at_once(monkeypatch, tmp_path, name, address):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no socksio
    monkeypatch.setenv(name, address)
    with pytest.raises(UserError, match=rf"^{name}=.*: expected http or https") as caught:
        get(tmp_path / NAME)
    assert PASSWORD not in str(caught.value)
    assert_only(tmp_path)


@pytest.mark.usefixtures("no_proxies")
def test_a_socks_proxy_that_nothing_goes_through_does_not_matter(server, tmp_path, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1")
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    assert get(tmp_path / NAME) == COMMIT
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1")
    monkeypatch.delenv("HTTP_PROXY")
    monkeypatch.setenv("NO_PROXY", "*")
    close_session()
    assert get(tmp_path / NAME) == COMMIT


@pytest.mark.usefixtures("no_proxies")
def test_certificates_that_are_not_there_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    with pytest.raises(UserError, match=r"^SSL_CERT_FILE=/no/such/file: cannot be read"):
        get(tmp_path / NAME)


@pytest.mark.parametrize("where", ["{}/cdn/" + NAME, "/cdn/" + NAME, "{}/datasets/" + REPO + "/resolve/main/" + NAME])
def test_a_mirror_that_sends_on_is_followed(server, tmp_path, monkeypatch, where):
    server.moved["/old"] = where.format(server.url)
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/old")
    get(tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == server.files[NAME]


@pytest.mark.parametrize(
    "where",
    ["/old/again", "ftp://x/y", "file:///etc/passwd", "http://[bad", "http://h:abc/", f"http://{'a' * 300}/", "/a\x01b",
     "http://h/\x7f", "http://h\x01/", "http://h:99999/", "http://h:0/", "http://a..b/", "javascript:alert(1)",
     "x" * 70_000, "http://u:s3cret@h:abc/", "http://h:abc/?token=s3cret"],
    ids=lambda where: ascii(where)[:30],
)  # fmt: skip
def test_a_redirect_that_leads_nowhere_is_one_line(server, tmp_path, monkeypatch, capsys, where):
    server.moved["/old"] = where
    monkeypatch.setenv("HF_ENDPOINT", server.url.replace("://", f"://me:{PASSWORD}@") + "/old")
    said = r"http://\*\*\*@127.*redirects (without end|to .*, which is no address)"
    with pytest.raises(UserError, match=said) as caught:
        get(tmp_path / NAME)
    assert "\n" not in str(caught.value) and PASSWORD not in str(caught.value) + capsys.readouterr().out
    assert_only(tmp_path)


def test_a_password_in_the_endpoint_is_used_and_never_shown(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", server.url.replace("://", f"://me:{PASSWORD}@"))
    server.faults[NAME] = [503]
    get(tmp_path / NAME)
    assert {b64decode(sent.removeprefix("Basic ")) for sent in server.authorizations} == {f"me:{PASSWORD}".encode()}
    for change in ({"name": "none.parquet"}, {"repo": "no/body"}, {"revision": "v9"}):
        with pytest.raises(UserError) as caught:
            get(tmp_path / "x", **change)
        assert "http://***@127.0.0.1" in str(caught.value) and PASSWORD not in str(caught.value)
    server.faults[NAME] = [503] * 99
    with pytest.raises(UserError) as caught:
        get(tmp_path / NAME)
    assert PASSWORD not in str(caught.value) + capsys.readouterr().out


def test_passing_server_errors_are_tried_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # after 429 the hub's client itself waits, for a second
    server.faults[NAME] = [500, 503, 429, 408]
    get(tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == server.files[NAME]
    assert server.gets(NAME) == 5


def test_lasting_server_error_ends_after_all_attempts(server, tmp_path):
    server.faults[NAME] = [500] * 99
    with pytest.raises(UserError, match=rf"could not get {NAME} from {server.url} \(HTTP 500; 5 attempts\)"):
        get(tmp_path / NAME)
    assert server.gets(NAME) == hub.ATTEMPTS
    assert_only(tmp_path)


@pytest.mark.usefixtures("no_proxies")
def test_where_a_proxy_does_not_answer_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    monkeypatch.setenv("http_proxy", "u:s3cret@127.0.0.1:1")
    with pytest.raises(
        UserError, match=r"from http://hub\.example by the proxy (http://)?\*\*\*@127\.0\.0\.1:1 \("
    ) as caught:
        get(tmp_path / NAME)
    assert PASSWORD not in str(caught.value)
    monkeypatch.setenv("no_proxy", "hub.example")
    with pytest.raises(UserError, match=r"from http://hub\.example \("):
        get(tmp_path / NAME)


def test_cut_transfer_goes_on_where_it_stopped(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the hub's client waits for a second
    server.faults[NAME] = ["cut"]
    get(tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == server.files[NAME]
    ranges = [wanted for method, _, wanted in server.requests if method == "GET"]
    assert ranges == [None, f"bytes={len(server.files[NAME]) // 2 // 1000 * 1000}-"]


def test_content_that_does_not_match_its_hash_is_fetched_again(server, tmp_path):
    server.faults[NAME] = ["html"]
    get(tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == server.files[NAME]
    server.faults[NAME] = ["html"] * 99
    with pytest.raises(UserError, match="sha256"):
        get(tmp_path / "again.parquet")
    assert_only(tmp_path, NAME)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "shard_99999.parquet"}, r"dataset someone/texts on .* has no file shard_99999\.parquet \(404"),
        ({"repo": "no/body"}, "has no dataset no/body, or it is private"),
        ({"revision": "v9"}, "someone/texts on .* has no revision v9"),
    ],
)
def test_what_is_not_there_is_said_at_once(server, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        get(tmp_path / "x.parquet", **change)
    assert "\n" not in str(caught.value)
    assert_only(tmp_path)


def test_forbidden_is_not_tried_again(server, tmp_path):
    server.faults[NAME] = [403]
    with pytest.raises(UserError, match=f"refused {NAME} of {REPO}: HTTP 403"):
        get(tmp_path / NAME)
    assert server.gets(NAME) == 1


def test_no_network_names_the_endpoint_and_the_ways_out(monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound but not listening: refused
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr(hub, "FIRST_WAIT", 0.001)
        with pytest.raises(UserError) as caught:
            get(tmp_path / NAME)
    message = str(caught.value)
    assert address in message and "HF_ENDPOINT" in message and "--source=pydocs" in message and "\n" not in message
    assert_only(tmp_path)


def test_a_plain_file_server_will_do(server, tmp_path):
    server.plain = True
    assert get(tmp_path / NAME) == "main"
    assert (tmp_path / NAME).read_bytes() == server.files[NAME]


def test_refused_content_leaves_nothing(server, tmp_path):
    def refuse(path):
        assert path.read_bytes() == server.files[NAME]
        raise UserError("not what was expected")

    with pytest.raises(UserError, match="not what was expected"):
        get(tmp_path / NAME, verify=refuse)
    assert_only(tmp_path)


def test_full_disk_leaves_no_half_file(server, tmp_path):
    def full(_done, _total):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        get(tmp_path / NAME, on_bytes=full)
    assert_only(tmp_path)
