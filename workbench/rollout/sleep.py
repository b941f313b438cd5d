"""Sleep of tensors in this process's own memory: their pages go back to the system, their addresses stay.

    awake --sleep(1)--> weights written to a private file, pages of weights and KV cache given back
          --sleep(2)--> the same without the file; `reload` writes the weights again on wake
    asleep --wake_up(["weights"])--> weights back --wake_up(["kv_cache"])--> KV pages committed again (zeros)

Knows tensors, pages and files. Does not know vLLM, transformers or models.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import itertools
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from workbench.cores import num_usable_cores
from workbench.errors import EngineError
from workbench.rollout.engine import PhaseTimes

if TYPE_CHECKING:
    import torch

__all__ = ["TAGS", "Block", "Sleeper", "blocks_of", "check_backup_dir", "default_backup_dir", "tidy"]

TAGS = ("weights", "kv_cache")

_LIBC = ctypes.CDLL(None, use_errno=True)
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_NUM_READERS = min(4, num_usable_cores())
_CHUNK_BYTES = 1 << 30  # one read or write moves at most 2 GiB - 4 KiB


@dataclass(frozen=True, slots=True)
class Block:
    """The memory of one tensor storage, bytes [address, address + num_bytes)."""

    address: int
    num_bytes: int

    def give_back(self) -> None:
        """Free the whole pages inside; they read as zeros afterwards. The two ends share pages with others and stay."""
        self._advise(_MADV_DONTNEED)

    def prefer_huge_pages(self) -> None:
        """Let its pages come back 2 MiB at a time: one fault instead of 512 (a wake is 3 times faster)."""
        with contextlib.suppress(OSError):  # a kernel without them gives plain pages
            self._advise(_MADV_HUGEPAGE)

    def commit(self) -> None:
        """Make every page resident now, contents unchanged, as a GPU does when it maps memory."""
        self.prefer_huge_pages()
        try:
            self._advise(_MADV_POPULATE_WRITE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # an older kernel: touch the pages
                raise
            view = self.view()
            for start in range(0, self.num_bytes, mmap.PAGESIZE):
                view[start] = view[start]

    def view(self) -> memoryview:
        return memoryview((ctypes.c_ubyte * self.num_bytes).from_address(self.address)).cast("B")

    def _advise(self, advice: int) -> None:
        first = -(-self.address // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (self.address + self.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last <= first:
            return
        if _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"madvise({advice}) over {last - first} bytes: {os.strerror(code)}")


def blocks_of(tensors: Iterable[torch.Tensor], *, without: Iterable[torch.Tensor] = ()) -> list[Block]:
    """The storages behind tensors, each once however many tensors share it, less those behind `without`."""
    found: dict[int, Block] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and storage.nbytes():
            found.setdefault(storage.data_ptr(), Block(storage.data_ptr(), storage.nbytes()))
    for tensor in without:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return list(found.values())


def tidy() -> float:
    """Collect garbage and give freed heap pages back to the system; returns the seconds it took."""
    start = time.monotonic()
    gc.collect()
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(ctypes.c_size_t(0))
    return time.monotonic() - start


def check_backup_dir(folder: str | os.PathLike[str], needed_bytes: int) -> Path:
    """The folder for backups of weights: on a disk, with room.

    Raises:
        EngineError: it lies in memory (tmpfs), where a backup frees nothing, or has no room.
    """
    path = Path(folder).absolute()
    kind = _filesystem(path)
    if kind in {"tmpfs", "ramfs"}:
        raise EngineError(f"backup folder {path} lies in memory ({kind}): weights written there free nothing\npass backup_dir= on a disk")
    stats = os.statvfs(path)
    free = stats.f_bavail * stats.f_frsize
    if free < needed_bytes:
        raise EngineError(
            f"no room for the weights of a sleeping engine in {path}\n"
            f"{free / 2**20:.0f} MiB are free; sleep level 1 needs {needed_bytes / 2**20:.0f} MiB\n"
            "free some, pass backup_dir= on another disk, or use sleep level 2"
        )
    return path


def _filesystem(path: Path) -> str:
    """Type of the file system that holds a path: the mount with the longest matching prefix."""
    best, kind = -1, ""
    resolved = f"{path.resolve()}/"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        point = left.split()[4].encode().decode("unicode_escape").rstrip("/") + "/"
        if resolved.startswith(point) and len(point) >= best:
            best, kind = len(point), right.split()[0]
    return kind


class Sleeper:
    """Weights and KV cache of one engine in this process, put to sleep and woken by tag.

    The backup has no name: it is made unlinked (O_TMPFILE), so nobody else can open it and it ends with the process, `kill -9`
    included.

    Args:
        weights: tensors whose memory sleeps at levels 1 and 2.
        kept: tensors that never sleep, named buffers for one.
        kv_cache: tensors whose contents are forgotten by every sleep.
        backup_dir: a folder on a disk.
        reload: writes every weight again in place, after level 2.
    """

    def __init__(
        self,
        *,
        weights: Iterable[torch.Tensor],
        kept: Iterable[torch.Tensor] = (),
        kv_cache: Iterable[torch.Tensor] = (),
        backup_dir: Path,
        reload: Callable[[], None],
    ) -> None:
        self._blocks = {"weights": blocks_of(weights, without=kept), "kv_cache": blocks_of(kv_cache)}
        self._backup_dir = backup_dir
        self._reload = reload
        self._backup: IO[bytes] | None = None
        self._level = 0
        self.asleep: frozenset[str] = frozenset()

    def num_bytes(self, tag: str) -> int:
        """Bytes of a tag when awake."""
        return sum(block.num_bytes for block in self._blocks[tag])

    def commit_kv_cache(self) -> None:
        """Make the KV cache resident, so that the first sleep frees all of it."""
        for block in self._blocks["kv_cache"]:
            block.commit()

    def sleep(self, level: int) -> PhaseTimes:
        """Give back what is still awake; a level-1 backup is written and synced first.

        Raises:
            EngineError: the backup could not be written; everything is still awake.
        """
        awake = [tag for tag in TAGS if tag not in self.asleep]
        self._level = level
        start = time.monotonic()
        if "weights" in awake:
            if level == 1:
                self._write_backup()
            self._give_back("weights")
        middle = time.monotonic()
        if "kv_cache" in awake:
            self._give_back("kv_cache")
        end = time.monotonic()
        self.asleep = frozenset(TAGS)
        return self._times(awake, middle - start, end - middle, tidy())

    def wake_up(self, tags: Sequence[str]) -> PhaseTimes:
        """Bring tags back; those that are awake already are left alone."""
        wanted = [tag for tag in TAGS if tag in tags and tag in self.asleep]
        tidy_s = tidy()
        start = time.monotonic()
        if "weights" in wanted:
            self._restore_weights()
        middle = time.monotonic()
        if "kv_cache" in wanted:
            self.commit_kv_cache()
        end = time.monotonic()
        self.asleep -= set(wanted)
        return self._times(wanted, middle - start, end - middle, tidy_s)

    def close(self) -> None:
        """Drop the backup; the weights of a sleeping engine are lost."""
        if self._backup is not None:
            self._backup.close()
            self._backup = None

    def _times(self, tags: Sequence[str], weights_s: float, kv_cache_s: float, tidy_s: float) -> PhaseTimes:
        weights, kv_cache = (self.num_bytes(tag) if tag in tags else 0 for tag in TAGS)
        return PhaseTimes(
            level=self._level,
            weights_s=weights_s,
            kv_cache_s=kv_cache_s,
            tidy_s=tidy_s,
            weights_bytes=weights,
            kv_cache_bytes=kv_cache,
        )

    def _give_back(self, tag: str) -> None:
        for block in self._blocks[tag]:
            block.give_back()

    def _write_backup(self) -> None:
        check_backup_dir(self._backup_dir, self.num_bytes("weights"))
        try:
            file = tempfile.TemporaryFile(dir=self._backup_dir, buffering=0)
            try:
                for block in self._blocks["weights"]:
                    _write_all(file.fileno(), block.view())
                os.fsync(file.fileno())
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise EngineError(f"weights could not be saved in {self._backup_dir}: {error}\nthe engine is still awake") from error
        self._backup = file

    def _restore_weights(self) -> None:
        if self._backup is None:
            self._reload()
            return
        blocks, fd = self._blocks["weights"], self._backup.fileno()
        starts = itertools.accumulate((block.num_bytes for block in blocks[:-1]), initial=0)
        with ThreadPoolExecutor(_NUM_READERS) as readers:  # half of a wake is page faults, which cores share
            for _ in readers.map(partial(_restore, fd), blocks, starts):
                pass
        file, self._backup = self._backup, None
        threading.Thread(target=file.close, name="workbench-backup").start()  # freeing its pages takes as long as reading them did


def _write_all(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view[:_CHUNK_BYTES]) :]


def _restore(fd: int, block: Block, start: int) -> None:
    """Read the bytes [start, start + block.num_bytes) of a file into the block."""
    block.prefer_huge_pages()
    view = block.view()
    while view:
        count = os.preadv(fd, [view[:_CHUNK_BYTES]], start)
        if count == 0:
            raise EngineError("the saved weights end early\nthe engine cannot wake; close it and start another")
        view, start = view[count:], start + count


def default_backup_dir() -> Path:
    """The first of the usual temporary folders that lies on a disk."""
    for folder in (tempfile.gettempdir(), "/var/tmp", os.getcwd()):
        if os.access(folder, os.W_OK) and _filesystem(Path(folder)) not in {"tmpfs", "ramfs"}:
            return Path(folder)
    raise EngineError("no temporary folder on a disk for the weights of a sleeping engine\npass backup_dir=")
