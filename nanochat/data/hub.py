"""One file of a dataset repository on the Hugging Face hub, or on a mirror of it named by HF_ENDPOINT."""

import hashlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from nanochat.errors import UserError
from nanochat.files import atomic_write

ATTEMPTS = 5
FIRST_WAIT = 1.0  # seconds, doubled after each failed attempt: 15 s in all
TIMEOUT = 30.0  # seconds without an answer or a byte
CHUNK = 1 << 20
RETRIED_STATUS = {408, 429, 500, 502, 503, 504}


class Downloaded(NamedTuple):
    """What the hub said about a file that was fetched."""

    revision: str
    size: int


class _Transient(Exception):
    """Worth another attempt: the network, or a server that is busy or broken for the moment."""


def endpoint() -> str:
    """HF_ENDPOINT as it is now (huggingface_hub reads it only when it is imported), else the public hub."""
    address = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not re.match(r"https?://[^/\s]+", address):
        raise UserError(f"HF_ENDPOINT={address}: expected an address that starts with https:// or http://")
    return address


def download(
    repo: str,
    filename: str,
    revision: str,
    path: Path,
    verify: Callable[[Path], None],
    otherwise: str,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
    stop: threading.Event | None = None,
) -> Downloaded:
    """Fetch `filename` of dataset `repo` at `revision` (a branch, tag or commit) to `path`, atomically.

    Transient failures are tried ATTEMPTS times with doubling waits, going on from the bytes already there. `verify`
    gets the finished temporary file before it takes its place and raises UserError if it is not what it should be.
    `otherwise` says what one can do without the hub. `on_bytes(done, total)` follows the progress. Setting `stop` ends
    the attempts early.
    Raises UserError for no network, a missing file, repository or revision, and damaged content.
    """
    stop = stop or threading.Event()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        for attempt in range(ATTEMPTS):
            try:
                fetched = _attempt(repo, filename, revision, temporary, otherwise, on_bytes, stop)
                break
            except _Transient as failure:
                reason = str(failure)
            wait = FIRST_WAIT * 2**attempt
            last = attempt == ATTEMPTS - 1
            if not last:
                print(f"{filename}: {reason}; trying again in {wait:.0f} s", flush=True)
            if last or stop.wait(wait):
                raise UserError(
                    f"could not get {filename} from {endpoint()} ({reason}; {attempt + 1} attempts): check the "
                    f"network, set HF_ENDPOINT to a mirror, or {otherwise}"
                )
        verify(temporary)
    return fetched


def _attempt(
    repo: str,
    filename: str,
    revision: str,
    temporary: Path,
    otherwise: str,
    on_bytes: Callable[[int, int], None],
    stop: threading.Event,
) -> Downloaded:
    where = endpoint()
    try:
        url = hf_hub_url(repo, filename, repo_type="dataset", revision=revision, endpoint=where)
        about = get_hf_file_metadata(url, timeout=TIMEOUT, endpoint=where)
        # the commit, not the branch: the file must be the one that was just described
        url = hf_hub_url(repo, filename, repo_type="dataset", revision=about.commit_hash or revision, endpoint=where)
        size = _stream(url, temporary, about.size, on_bytes, stop)
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError) as error:
        raise _not_there(error, repo, filename, revision) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in RETRIED_STATUS:
            raise _Transient(f"HTTP {status}") from None
        if status == 404:
            raise _not_there(error, repo, filename, revision) from None
        raise UserError(f"{where} refused {filename} of {repo}: HTTP {status} (see `hf auth login`)") from None
    except OfflineModeIsEnabled:
        raise UserError(f"HF_HUB_OFFLINE is set, but {filename} is needed: unset it, or {otherwise}") from None
    except HTTPError as error:  # every failure below HTTP: no name, no route, refused, reset, timed out
        raise _Transient(_first_line(error)) from None
    etag = about.etag or ""
    if re.fullmatch(r"[0-9a-f]{64}", etag):  # large files are known by their sha256
        with open(temporary, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != etag:
            temporary.unlink()
            raise _Transient(f"sha256 is {digest[:12]}…, expected {etag[:12]}…")
    return Downloaded(about.commit_hash or revision, size)


def _stream(
    url: str,
    temporary: Path,
    size: int | None,
    on_bytes: Callable[[int, int], None],
    stop: threading.Event,
) -> int:
    """Append what is missing of `url` to `temporary`; returns its full size in bytes."""
    done = temporary.stat().st_size if temporary.exists() else 0
    if size is not None and done > size:
        temporary.unlink()
        done = 0
    if size is None or done < size or size == 0:
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if done:
            headers["Range"] = f"bytes={done}-"
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            if done and response.status_code != 206:  # a server without ranges sends everything again
                done = 0
            with open(temporary, "ab" if done else "wb") as file:
                for chunk in response.iter_bytes(CHUNK):
                    if stop.is_set():
                        raise UserError("stopped")
                    file.write(chunk)
                    done += len(chunk)
                    on_bytes(done, size or 0)
    if size is not None and done != size:
        raise _Transient(f"{done:,} of {size:,} bytes came")
    return done


def _not_there(error: HfHubHTTPError, repo: str, filename: str, revision: str) -> UserError:
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"{endpoint()} has no dataset {repo}, or it is private: check HF_ENDPOINT, or `hf auth login`")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"dataset {repo} on {endpoint()} has no revision {revision}")
    return UserError(f"dataset {repo} on {endpoint()} has no file {filename} (404, revision {revision})")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
