"""Who may not, cannot: another user, a peer without the token, a forged object; and what is open is told."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import workbench as wb
from workbench.ranks.cluster import Cluster
from workbench.rollout.handle import EngineHandle

NOBODY = 65534
PROBE = """
import json, os, socket, sys
told = {}
for path in json.loads(sys.argv[1]):
    try:
        if path.endswith(".sock"):
            socket.socket(socket.AF_UNIX).connect(path)
        elif os.path.isdir(path) or path.endswith("/"):
            os.listdir(path)
        else:
            open(path, "rb").read()
        told[path] = "open"
    except OSError as error:
        told[path] = type(error).__name__
print(json.dumps([os.getuid(), told]))
"""


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(2, record="failures") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def engine(cluster) -> EngineHandle:
    return wb.start_engine(cluster, backend="hf")


def as_nobody(paths: list[Path]) -> dict[str, str]:
    """What another user meets at these paths."""
    python = Path(sys.executable).resolve()
    interpreter = "/usr/bin/python3" if not os.access("/root", os.X_OK) or str(python).startswith("/root") else str(python)
    words = [interpreter, "-I", "-c", PROBE, json.dumps([str(path) for path in paths])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/")
    assert done.returncode == 0, done.stderr
    uid, told = json.loads(done.stdout)
    assert uid == NOBODY
    return dict(told)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_reaches_neither_sockets_nor_tapes_nor_folders(cluster, engine, tmp_path):
    for folder in [tmp_path, *tmp_path.parents]:  # so that it is our folders that refuse, not pytest's or the temporary folder
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    with cluster.record(tmp_path / "tape"):
        cluster.execute("dist.barrier()")
    with pytest.raises(wb.RankFailed):
        cluster.execute("1 / 0")
    session = cluster.save_session(tmp_path / "session.json")
    (tmp_path / "open.txt").write_text("anyone")
    (tmp_path / "open.txt").chmod(0o644)
    for folder in (cluster.folder.parent, Path(os.environ["WORKBENCH_HOME"])):
        folder.chmod(0o755)
    sockets = list(cluster.folder.glob("*.sock"))
    assert len(sockets) == 2  # the door's and the engine's
    home = Path(os.environ["WORKBENCH_HOME"])
    private = [
        *sockets,
        cluster.folder,
        cluster.folder / "door.token",
        cluster.folder / "tapes" / "rank-0.tape",
        tmp_path / "tape",
        tmp_path / "tape" / "rank-0.tape",
        Path(cluster.last_tape),
        Path(cluster.last_tape) / "rank-1.tape",
        home / "session.key",
        session,
    ]
    assert all(path.exists() for path in private)
    told = as_nobody([*private, tmp_path / "open.txt"])
    assert told.pop(str(tmp_path / "open.txt")) == "open"  # the probe can read what is open
    assert told == dict.fromkeys(map(str, private), "PermissionError")
    for folder in (cluster.folder.parent, home):
        folder.chmod(0o700)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_tape_of_another_user_is_not_unpickled(cluster, tmp_path):
    with cluster.record(tmp_path / "tape"):
        cluster.execute("1")
    os.chown(tmp_path / "tape" / "rank-0.tape", NOBODY, NOBODY)
    with pytest.raises(wb.ReplayError, match="belongs to another user or can be written by others\na tape runs code: own it"):
        wb.replay(tmp_path / "tape", rank=0)


def test_an_engine_unpickles_nothing_of_a_peer_without_the_token(engine, tmp_path):
    from workbench.ranks.channel import frame, pack
    from workbench.rollout.host import Call

    (address,) = engine.addresses().values()
    message = b"".join(bytes(part) for part in frame(Call(ticket=1, verb="memory"), pack(((Bomb(tmp_path / "ran"),), {}))))
    header = b"".join(bytes(part) for part in frame(Bomb(tmp_path / "ran"), None))
    for token in (b"", b"\0" * 32, address.token[:-1] + bytes([address.token[-1] ^ 1])):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address.path)
            sock.sendall(token + (message + header) * 3)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(10)
            try:
                assert sock.recv(1) == b""
            except ConnectionResetError:
                continue
    time.sleep(0.3)
    assert not (tmp_path / "ran").exists() and engine.status == "awake"
    with socket.socket(socket.AF_UNIX) as sock:  # the same bytes behind the token are read: it is the token that kept them out
        sock.connect(address.path)
        sock.sendall(address.token + header)
        limit = time.monotonic() + 10
        while not (tmp_path / "ran").exists() and time.monotonic() < limit:
            time.sleep(0.02)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("forged", ["body", "digest", "unsigned"])
def test_an_object_forged_in_an_open_store_is_not_unpickled(monkeypatch, tmp_path, forged):
    """Whoever can log in reaches the store of a stateless group on loopback, and can write there; the key is what he lacks."""
    monkeypatch.setenv("WORKBENCH_KEY", "k" * 64)
    group = wb.StatelessGroup.create("127.0.0.1", 0, 0, 1)
    try:
        group.send_obj(Bomb(tmp_path / "ran"), dst=0)
        stranger = torch.distributed.TCPStore("127.0.0.1", group.port, is_master=False, wait_for_workers=False)
        data = bytearray(stranger.get("send/0/0/0"))
        if forged == "unsigned":
            data[:32] = bytes(32)
        else:
            data[-3 if forged == "body" else 0] ^= 1
        stranger.set("send/0/0/0", bytes(data))  # type: ignore[arg-type]  # torch's stub says str
        with pytest.raises(wb.GroupError, match="an object arrived that does not carry this world's key; it was not unpickled"):
            group.recv_obj(0)
        assert not (tmp_path / "ran").exists()
        group.send_obj({"honest": 1}, dst=0)
        assert group.recv_obj(0) == {"honest": 1}
    finally:
        group.destroy()


def test_every_rank_has_the_key_of_its_cluster_and_no_other(cluster):
    first = cluster.run(lambda: os.environ["WORKBENCH_KEY"])
    with wb.launch(1) as other:
        (second,) = other.run(lambda: os.environ["WORKBENCH_KEY"])
    assert len(set(first)) == 1 and first[0] != second and re.fullmatch("[0-9a-f]{64}", second)
    assert "WORKBENCH_KEY" not in os.environ


def test_nothing_listens_beyond_loopback(cluster, engine):
    children = {process.pid for process in psutil.Process().children(recursive=True)}
    ranks = {status.pid for status in cluster.status()}
    assert ranks | set(engine.pids) <= children
    cluster.execute("dist.all_reduce(torch.ones(1)); half = dist.new_group([0, 1]); dist.barrier(group=half)")
    found = [
        (pid, connection.laddr.ip)
        for pid in {os.getpid(), *children}
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or not connection.raddr
    ]
    assert found and {ip for _, ip in found} <= {"127.0.0.1", "::1"}, found


def test_the_doctor_says_what_is_open(capsys):
    from workbench.ranks import doctor

    doctor.main([])
    told = " ".join(capsys.readouterr().out.split())
    assert "loopback" in told and "without passwords" in told and "who can log in to this machine can reach them" in told
