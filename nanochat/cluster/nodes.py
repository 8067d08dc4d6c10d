"""Several nodes, one of which decides: what pretrain.sh uses so that stages run on all nodes or on node 0 alone.

    python -m nanochat.cluster.nodes FOLDER --nodes=4 --node-rank=0 -- bash pretrain.sh      node 0: run this script
    python -m nanochat.cluster.nodes FOLDER --nodes=4 --node-rank=1      the others: run what node 0 starts, to its end

In a folder of the shared store node 0 leaves `beat` ("<attempt> <count>", counting while it lives), `order` (the last
command that all nodes run together, see announce) and `end` ("<attempt> <exit code>"); the others answer its
beat by joined-<attempt>-<node rank>. What an earlier attempt left is known by a beat that does not change, so neither
clocks nor times of files matter.
"""

import contextlib
import ipaddress
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from nanochat import cli
from nanochat.cli import float_flag, int_flag
from nanochat.errors import UserError
from nanochat.files import atomic_write_text
from nanochat.launch import DEFAULT_PORT
from nanochat.pipeline import ForwardedSignals, exit_code, wait

STOPPED = 128 + signal.SIGTERM
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
BEAT_SECONDS = 2.0
GRACE_SECONDS = 60.0  # for a command here to end by itself once node 0 has ended


def lead(folder: Path, nodes: int, patience: float, command: Sequence[str]) -> int:
    """On node 0: run `command` once all others have joined, with a heartbeat for them until it ends. Its exit code.

    Raises UserError when a node does not join within `patience` s.
    """
    attempt = f"{time.time_ns()}-{os.getpid()}"  # of its own: the same job may have been here before
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("joined-*"):
        old.unlink()
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(folder, attempt, ended), daemon=True)
    heart.start()
    code = 1
    try:
        # its stage runner would not live to end the stage if this killed it
        with ForwardedSignals(SIGNALS, kill=False) as signals:
            if not _others_joined(folder, attempt, nodes, patience, signals.received):
                code = 128 + signals.received[0]
                return code
            environment = {**os.environ, "NODES_FOLDER": str(folder), "NODES_ATTEMPT": attempt}
            child = subprocess.Popen(command, env=environment, start_new_session=True)
            signals.attach(child.pid)
            code = exit_code(wait(child))
    finally:
        ended.set()
        heart.join()
        atomic_write_text(folder / "end", f"{attempt} {code}\n")
        atomic_write_text(folder / "beat", f"{attempt} last\n")  # who looks only now learns which attempt has ended
    return code


def _beat(folder: Path, attempt: str, ended: threading.Event) -> None:
    for count in itertools.count():
        with contextlib.suppress(OSError):  # a shared file system may be away for a while
            atomic_write_text(folder / "beat", f"{attempt} {count}\n")
        if ended.wait(BEAT_SECONDS):
            return


def _others_joined(folder: Path, attempt: str, nodes: int, patience: float, signals: Sequence[int]) -> bool:
    """Wait until all are here; False when a signal came before. A node with another folder for its store would
    otherwise show only hours later."""
    started = next_word = time.monotonic()
    while not signals:
        ranks = range(1, nodes)
        missing = " ".join(str(rank) for rank in ranks if not (folder / f"joined-{attempt}-{rank}").exists())
        if not missing:
            return True
        if time.monotonic() - started >= patience:
            raise UserError(
                f"nodes {missing} of {nodes} did not join in {patience:g} s: see their logs, and check that {folder} "
                "is in one NANOCHAT_BASE_DIR that all nodes share"
            )
        if time.monotonic() >= next_word:
            print(f"waiting for nodes {missing} of {nodes} to join, in {folder}", flush=True)
            next_word += 60
        time.sleep(0.2)
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""


class Follower:
    """Runs what node 0 announces in `folder`, one command after the other."""

    def __init__(self, folder: Path, node_rank: int, patience: float, signals: ForwardedSignals) -> None:
        """patience: seconds without a beat after which node 0 counts as dead. signals: after one the command here saves
        and ends, and we wait for node 0 to say how it went."""
        self.folder, self.node_rank, self.patience, self.signals = folder, node_rank, patience, signals
        self.beat = _read(folder / "beat")  # may be left from an earlier attempt: only a change is a heartbeat
        self.alive_at = time.monotonic()
        self.attempt = ""
        self.done = 0  # number of the last order that was begun
        self.child: subprocess.Popen[bytes] | None = None
        self.must_end_at = 0.0

    def look(self) -> int | None:
        """One look at the folder and at what runs here; an exit code once there is no more to do.

        Raises UserError when node 0 has given no heartbeat for too long.
        """
        self._listen()
        attempt, _, end_code = _read(self.folder / "end").partition(" ")
        ended = bool(self.attempt) and attempt == self.attempt
        if self.child is not None:
            code = self.child.poll()
            if code is None:
                if not ended:
                    self.must_end_at = time.monotonic() + GRACE_SECONDS
                elif time.monotonic() > self.must_end_at:
                    self.end_child()  # it waits for a process of node 0 that is gone
                return None
            self.child = self.signals.group = None
            if code != 0 and not self.signals.received and not ended:
                return exit_code(code)
        if ended:
            return int(end_code)
        if self.signals.received and not self.attempt:  # nothing has begun
            return STOPPED
        order = json.loads(_read(self.folder / "order") or "{}")
        if not self.signals.received and order.get("attempt") == self.attempt and order["number"] > self.done:
            self.done = order["number"]
            environment = {name: value for name, value in os.environ.items() if name != "NODES_FOLDER"}
            words = [sys.executable, "-m", "nanochat.launch", *order["words"]]
            self.child = subprocess.Popen(words, env=environment, start_new_session=True)
            self.signals.attach(self.child.pid)
        return None

    def _listen(self) -> None:
        beat = _read(self.folder / "beat")
        if beat and beat != self.beat:
            self.beat, self.alive_at = beat, time.monotonic()
            attempt = beat.partition(" ")[0]
            if attempt != self.attempt:  # node 0 has started anew
                self.end_child()
                self.attempt, self.done = attempt, 0
                (self.folder / f"joined-{attempt}-{self.node_rank}").touch()
        elif time.monotonic() - self.alive_at > self.patience:
            self.end_child()
            raise UserError(
                f"no heartbeat of node 0 in {self.folder} for {self.patience:g} s: see its log, and check that "
                "NANOCHAT_BASE_DIR is one shared folder on all nodes"
            )

    def end_child(self) -> None:
        """End what runs here, if anything does."""
        if self.child is not None:
            self.child.terminate()
            self.child.wait()
            self.child = self.signals.group = None


def announce(environment: Mapping[str, str], words: Sequence[str]) -> None:
    """On node 0, tell the others what to run as well: numbered from 1 in each attempt."""
    if not environment.get("NODES_FOLDER"):
        return
    path, attempt = Path(environment["NODES_FOLDER"]) / "order", environment.get("NODES_ATTEMPT", "")
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    number = before["number"] + 1 if before.get("attempt") == attempt else 1
    atomic_write_text(path, json.dumps({"attempt": attempt, "number": number, "words": list(words)}))


def reachable(environment: Mapping[str, str], address: str, port: int, seconds: float = 5.0) -> str:
    """`address` of node 0, or on Volcengine its other one (VPC) where that answers and `address`, which with RDMA is of
    that network, does not. Each node may choose by itself, because node 0 listens on all of its addresses."""
    other = environment.get("MLP_WORKER_0_PRIMARY_HOST", "").strip() or address
    for host in (address, other) if other != address else ():
        try:
            socket.create_connection((host, port), timeout=seconds).close()
        except ConnectionRefusedError:
            pass  # node 0 is there and does not listen yet
        except OSError:
            continue
        return host
    return address


def own_address(address: str) -> str | None:
    """The address under which a node that reaches `address` can itself be reached; None where it cannot be told."""
    try:
        family, *_, target = socket.getaddrinfo(address, DEFAULT_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: it only chooses the way
            own = probe.getsockname()[0]
    except OSError:
        return None
    return None if ipaddress.ip_address(own.partition("%")[0]).is_loopback else own


@dataclass(frozen=True)
class Settings:
    """On node 0 run a script (after `--`), on the others what it starts on all nodes, until it ends. The exit code is
    that of the script."""

    folder: Path
    """where node 0 leaves its word, below the shared store"""
    _: KW_ONLY
    node_rank: Annotated[int, int_flag(gte=0)] = 1
    """number of this node"""
    nodes: Annotated[int, int_flag(gte=1)] = 1
    """number of nodes"""
    patience: Annotated[float, float_flag(gte=0)] = 900.0
    """seconds without a heartbeat of node 0 after which it counts as dead, and that node 0 waits for others to join"""
    poll: Annotated[float, float_flag(gte=0.01)] = 1.0
    """seconds between two looks"""


def main(settings: Settings, command: Sequence[str]) -> int:
    """Lead or follow to the end; the exit code. Raises UserError when the other side is silent for too long."""
    if settings.node_rank == 0:
        return lead(settings.folder, settings.nodes, settings.patience, command)
    next_word = time.monotonic()
    with ForwardedSignals(SIGNALS, kill=False, instead=signal.SIGTERM) as signals:
        follower = Follower(settings.folder, settings.node_rank, settings.patience, signals)
        while (code := follower.look()) is None:
            if follower.child is None and time.monotonic() >= next_word:
                waits_for = "its next command" if follower.attempt else "a first heartbeat"
                print(f"waiting for {waits_for} from node 0, in {settings.folder}", flush=True)
                next_word = time.monotonic() + 60
            time.sleep(settings.poll)
    print(f"node 0 has ended, or a command failed here: exit code {code}", flush=True)
    return code


if __name__ == "__main__":
    cli.run_with_command(main, Settings)
