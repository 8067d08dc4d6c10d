"""One file of a dataset repository on the Hugging Face hub, or on a mirror of it named by HF_ENDPOINT.

huggingface_hub describes and transfers the file. Its `hf_hub_download` does not serve here: it refuses plain file
servers as mirrors and checks no sha256. A transfer that breaks off goes on where it stopped, after a kill from 0.
"""

import contextlib
import importlib.util
import io
import os
import re
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from nanochat.errors import UserError, masked
from nanochat.files import atomic_write, sha256_file

try:
    with contextlib.redirect_stdout(io.StringIO()):  # where that fails, it prints a line of its own
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HTTPError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session, logging
except ValueError as error:  # it reads its settings, ports and seconds among them, as it is imported
    named = ", ".join(sorted(name for name in os.environ if name.startswith("HF_")))
    raise UserError(f"{named}: not all of these variables can be used ({error}); correct or unset them") from None

ATTEMPTS = 5
FIRST_WAIT = 1.0  # seconds, doubled after each failed attempt: 15 s in all
LONGEST_ADDRESS = 8192  # characters; httpx takes no more than 65,536
TIMEOUT = 30.0  # seconds for the hub to say what a file is
RETRIED_STATUS = {408, 429, 500, 502, 503, 504}

disable_progress_bars("huggingface_hub.http_get")  # ours is dataset.py's
logging.set_verbosity_error()


class _Transient(Exception):
    """Worth another attempt: the network, or a server that is busy or broken for the moment."""


class _Watched(io.FileIO):
    """A file to append to, which reports its size and takes no more once `stop` is set."""

    def __init__(self, path: Path, on_bytes: Callable[[int, int], None], stop: threading.Event) -> None:
        super().__init__(path, "a")
        self.path, self.on_bytes, self.stop, self.total = path, on_bytes, stop, 0

    def write(self, chunk: bytes) -> int:  # type: ignore[override]
        if self.stop.is_set():
            raise UserError("stopped")
        written = super().write(chunk)
        self.on_bytes(self.tell(), self.total)
        return written


def endpoint() -> str:
    """HF_ENDPOINT as it is now (huggingface_hub reads it only when it is imported), else the public hub."""
    address = os.environ.get("HF_ENDPOINT", "").strip() or "https://huggingface.co"
    if not _is_address(address, ("http", "https")):
        shown = masked("".join(address.split())).partition("?")[0]  # behind it there may be a token
        raise UserError(f"HF_ENDPOINT={shown}: expected an address such as https://HOST or http://HOST:PORT/PATH")
    return address.rstrip("/")


def _is_address(text: str, schemes: Collection[str]) -> bool:
    """Whether httpx takes `text`: for some others it raises what is no HTTPError."""
    try:
        parts = urllib.parse.urlsplit(text)
        host = (parts.hostname or "").encode("idna").decode()
        known = parts.scheme in schemes and parts.port != 0 and re.fullmatch(r"[\w.:-]*\w\.?", host)
    except ValueError:  # also UnicodeError
        return False
    return bool(known) and not re.search(r"[\s?#\x00-\x1f]", text)


def check_connection() -> None:
    """Raises UserError for an HF_ENDPOINT, a proxy or certificates that cannot be used, before any request."""
    endpoint()
    proxies = urllib.request.getproxies()
    if "*" in proxies.get("no", "").split(","):
        proxies = {}
    if proxies.keys() >= {"http", "https"} and "all" in proxies:  # nothing goes there, but httpx would refuse to start
        for name in ("ALL_PROXY", "all_proxy"):
            os.environ.pop(name, None)
        del proxies["all"]
    schemes = ("http", "https", *(("socks5", "socks5h") if importlib.util.find_spec("socksio") else ()))
    for kind in ("all", "https", "http"):
        address = proxies.get(kind, "")
        if address and not _is_address(address if "://" in address else f"http://{address}", schemes):
            name = f"{kind}_proxy" if f"{kind}_proxy" in os.environ else f"{kind}_proxy".upper()
            socks = "; for socks5, install socksio" * address.startswith("socks")  # and nothing else needs it
            raise UserError(
                f"{name}={masked(address)}: expected {' or '.join(schemes)}, as in http://HOST:PORT; set it to such a "
                f"proxy, or unset it{socks}"
            )
    try:
        hooks = get_session().event_hooks["response"]
    except OSError as error:
        file = os.environ.get("SSL_CERT_FILE", "")
        raise UserError(f"SSL_CERT_FILE={file}: cannot be read ({error}); correct or unset it") from None
    if not all(map(str.isascii, build_hf_headers().values())):
        raise UserError("HF_TOKEN, or what `hf auth login` has kept, has letters that are no ASCII: copy it again")
    if _check_redirect not in hooks:
        hooks.append(_check_redirect)


def _by_proxy() -> str:
    """Through which proxy the hub is asked, for messages; empty where none is."""
    address, proxies = urllib.parse.urlsplit(endpoint()), urllib.request.getproxies()
    proxy = proxies.get(address.scheme, proxies.get("all", ""))
    return f" by the proxy {masked(proxy)}" if proxy and not urllib.request.proxy_bypass(address.netloc) else ""


def _check_redirect(response: Any) -> None:
    """Raises UserError where a server sends on to what is no address: httpx raises ValueError, InvalidURL or what looks
    like a broken connection for it, by version and by how."""
    location = response.headers.get("Location", "")
    if not response.is_redirect or not location:
        return
    try:
        parts = urllib.parse.urlsplit(urllib.parse.urljoin(str(response.url), location))
        good = _is_address(f"{parts.scheme}://{parts.netloc}", ("http", "https")) and len(location) < LONGEST_ADDRESS
    except ValueError:
        good = False
    if not good or re.search(r"[\x00-\x1f\x7f]", location):
        shown = masked("".join(location.split())).partition("?")[0][:100]  # behind it there may be a token
        raise UserError(f"{masked(endpoint())} redirects to {shown!a}, which is no address: set HF_ENDPOINT to another")


def download(
    repo: str,
    filename: str,
    revision: str,
    path: Path,
    verify: Callable[[Path], None],
    otherwise: str,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
    stop: threading.Event | None = None,
) -> str:
    """Fetch `filename` of dataset `repo` at `revision` (a branch, tag or commit) to `path`, atomically; returns the
    commit.

    Transient failures are tried ATTEMPTS times with doubling waits, going on from the bytes already there. `verify`
    gets the finished temporary file before it takes its place and raises UserError if it is not what it should be.
    `otherwise` says what one can do without the hub. Setting `stop` ends the attempts early. Raises UserError for no
    network, a missing file, repository or revision, and damaged content.
    """
    check_connection()
    stop = stop or threading.Event()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with _Watched(temporary, on_bytes, stop) as file:
                    commit = _fetch(repo, filename, revision, file)
                break
            except OfflineModeIsEnabled:
                raise UserError(f"HF_HUB_OFFLINE is set, but {filename} is needed: unset it, or {otherwise}") from None
            except (HTTPError, _Transient) as error:
                reason = masked(_passing_reason(error, repo, filename, revision))
            wait = FIRST_WAIT * 2 ** (attempt - 1)
            if attempt < ATTEMPTS:
                print(f"{filename}: {reason}; trying again in {wait:.0f} s", flush=True)
            if attempt == ATTEMPTS or stop.wait(wait):
                raise UserError(
                    f"could not get {filename} from {masked(endpoint())}{_by_proxy()} ({reason}; {attempt} attempts): "
                    f"check the network, set HF_ENDPOINT to a mirror, or {otherwise}"
                )
        verify(temporary)
    return commit


def _fetch(repo: str, filename: str, revision: str, file: _Watched) -> str:
    where = endpoint()
    url = hf_hub_url(repo, filename, repo_type="dataset", revision=revision, endpoint=where)
    about = get_hf_file_metadata(url, timeout=TIMEOUT, endpoint=where)
    # the commit, not the branch: the file must be the one that was just described
    commit = about.commit_hash or revision
    url = hf_hub_url(repo, filename, repo_type="dataset", revision=commit, endpoint=where)
    file.total = about.size or 0
    try:
        # compressed on the way, a file would be of another size
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=about.size)
    except OSError as error:
        if isinstance(error, HTTPError) or error.errno is not None:
            raise
        raise _Transient(f"{file.tell():,} of {file.total:,} bytes came") from None
    etag = about.etag or ""
    if re.fullmatch(r"[0-9a-f]{64}", etag) and (digest := sha256_file(file.path)) != etag:  # large files have it
        file.path.unlink()
        raise _Transient(f"sha256 is {digest[:12]}…, expected {etag[:12]}…")
    return commit


def _passing_reason(error: Exception, repo: str, filename: str, revision: str) -> str:
    """Why another attempt may help. Raises UserError where none will."""
    where = masked(endpoint())
    if type(error).__name__ == "TooManyRedirects":  # of httpx or httpx2: the hub's client has changed
        raise UserError(f"{where} redirects without end: set HF_ENDPOINT to another") from None
    if not isinstance(error, HfHubHTTPError):  # below HTTP: no name, no route, refused, reset, timed out
        return (str(error) or type(error).__name__).splitlines()[0]
    status = error.response.status_code
    if status in RETRIED_STATUS:
        return f"HTTP {status}"
    if isinstance(error, RepositoryNotFoundError):
        text = f"{where} has no dataset {repo}, or it is private: check HF_ENDPOINT, or `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        text = f"dataset {repo} on {where} has no revision {revision}"
    elif status == 404:
        text = f"dataset {repo} on {where} has no file {filename} (404, revision {revision})"
    else:
        text = f"{where} refused {filename} of {repo}: HTTP {status} (see `hf auth login`)"
    raise UserError(text) from None
