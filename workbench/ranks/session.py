"""A session: every cell that was run on ranks, what each rank gave, and what it was run with, in one file.

    {"format", "sha256": of the session's text, "signature": keyed by this user, "session": {launch, environment, cells, values, ...}}

The file is a program: whoever reproduces it runs its cells and its pickles. So it carries a signature made with a key of this user, and one
that carries none, or another's, is only read as text until it is trusted by name. Knows files. Does not know how cells are run.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import workbench
from workbench.errors import SessionError
from workbench.home import home
from workbench.ranks.channel import Packed

__all__ = ["Entry", "Output", "Session", "read_session", "write_session"]

_FORMAT = "workbench session 1"
_KEY_FILE = "session.key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What one rank gave in one cell; rank -1 is the driver.

    Attributes:
        outcome: "ok", "raised", "freed" or "died".
        text: its result, shortened, or what it raised.
        digest: of its result; "" where that cannot be compared, and then `reason` says why.
        stdout: the beginning of what it printed; `stdout_digest` is of all of it.
    """

    rank: int
    outcome: str
    text: str = ""
    digest: str = ""
    reason: str = ""
    stdout: str = ""
    stdout_digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One cell, or one thing done to the cluster.

    Attributes:
        task: a `Task`, or "driver" (a function of the workbench that runs cells itself), "method" (a call on what such a function gave),
            "kill", "respawn", "restart", "inject", "end inject".
        text: source, name of the function or method, or expression.
        ranks: who took part.
        value: key of its pickle among the session's values, "" where it has none.
        unkept: why its pickle is not there, "" where it is.
        stop: why it was ended ("failure", "deadlock", "timeout", "interrupt"), "" where it ended by itself.
        seconds: how long it took.
    """

    number: int
    task: str
    text: str = ""
    ranks: tuple[int, ...] = ()
    value: str = ""
    unkept: str = ""
    timeout_s: float | None = None
    stop: str = ""
    seconds: float = 0.0
    outputs: tuple[Output, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A session as it was saved.

    Attributes:
        launch: what `wb.launch` was given.
        environment: as `describe_environment` tells it.
        layout: repr of the layout in use at the end.
        values: pickles of functions with their arguments and of pushed names, by their hash.
        notes: what is not in it.
    """

    launch: Mapping[str, Any]
    environment: Mapping[str, Any]
    layout: str
    saved_at: str
    entries: tuple[Entry, ...]
    values: Mapping[str, Packed] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def write_session(session: Session, path: str | os.PathLike[str]) -> Path:
    """Write a session, signed by this user, readable by this user only.

    Raises:
        SessionError: the file holds something else, or cannot be written.
    """
    target = Path(path).resolve()
    if target.is_dir() or target.is_file() and not _is_session(target):
        raise SessionError(f"{target} is there already and is no session\nit was left as it is\nchoose another path")
    text = _to_text(session)
    whole = {"format": _FORMAT, "sha256": hashlib.sha256(text.encode()).hexdigest(), "signature": _sign(text), "session": json.loads(text)}
    half = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(whole, file, indent=1)
        half.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            half.unlink()
        raise SessionError(f"the session was not written to {target}: {error}\nchoose a folder that can be written") from error
    return target


def read_session(path: str | os.PathLike[str], *, trust: bool = False) -> Session:
    """Read a session; nothing in it is run or unpickled.

    Args:
        trust: also take one that this user did not sign.

    Raises:
        SessionError: there is none, it is damaged, of another format, or not this user's.
    """
    target = Path(path)
    try:
        whole = json.loads(target.read_text(encoding="utf-8"))
    except OSError as error:
        raise SessionError(f"there is no session at {target}: {error}\nsave one: cluster.save_session(path)") from error
    except ValueError as error:
        raise SessionError(f"{target} is no session, or is cut short: {error}\nsave it again: cluster.save_session(path)") from error
    if not isinstance(whole, dict) or whole.get("format") != _FORMAT:
        found = whole.get("format") if isinstance(whole, dict) else type(whole).__name__
        raise SessionError(
            f"{target} is no session that workbench {workbench.__version__} reads\nits format is {found!r}, not {_FORMAT!r}\n"
            "save it again with this version, or reproduce it with the one that wrote it"
        )
    try:
        session = _from_plain(whole["session"])
        text, checksum, signature = _dump(whole["session"]), str(whole["sha256"]), str(whole["signature"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SessionError(f"{target} is damaged: {type(error).__name__}: {error}\nsave it again: cluster.save_session(path)") from error
    if hashlib.sha256(text.encode()).hexdigest() != checksum and not trust:
        raise SessionError(
            f"{target} is damaged, or was edited: it does not match its checksum\nsave it again, or trust=True runs it as it is"
        )
    if not trust and not hmac.compare_digest(_sign(text), signature):
        raise SessionError(
            f"{target} was not saved by this user on this machine\n"
            "to reproduce a session is to run its code, and its signature is not this user's\n"
            "read it first: workbench reproduce --show PATH; then trust=True, or --trust, runs it"
        )
    return session


def _is_session(path: Path) -> bool:
    with path.open("rb") as file:
        return _FORMAT.encode() in file.read(64)


def _to_text(session: Session) -> str:
    plain = asdict(session) | {"values": {key: _value_to_plain(packed) for key, packed in session.values.items()}}
    return _dump(plain)


def _dump(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def _value_to_plain(packed: Packed) -> list[str]:
    return [base64.b64encode(part).decode() for part in (packed.data, *packed.buffers)]


def _from_plain(plain: dict[str, Any]) -> Session:
    entries = tuple(
        Entry(**{**entry, "ranks": tuple(entry["ranks"]), "outputs": tuple(Output(**output) for output in entry["outputs"])})
        for entry in plain["entries"]
    )
    values = {}
    for key, (data, *buffers) in plain["values"].items():
        values[key] = Packed(base64.b64decode(data), tuple(bytearray(base64.b64decode(part)) for part in buffers))
    return Session(**{**plain, "entries": entries, "values": values, "notes": tuple(plain["notes"])})


def _sign(text: str) -> str:
    return hmac.new(_key(), text.encode(), hashlib.sha256).hexdigest()


def _key() -> bytes:
    """This user's key, made when it is first needed."""
    path = home() / _KEY_FILE
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise SessionError(f"{path} can be read by others, or is theirs\nit signs what may run as you\nremove it; a new one is made")
        return file.read()
