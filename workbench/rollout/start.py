"""`start_engine`: from a model's name to engine processes that belong to a cluster.

    rooted       one process, works for all ranks
    independent  a process a rank
    grouped      a process a rank; those of tp consecutive ranks are one tensor-parallel engine

Each is forked from a server that has imported vLLM, so that only the first pays for the import. Knows clusters and engine processes.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import models
from workbench.cores import num_usable_cores
from workbench.errors import ClusterClosed, EngineError
from workbench.ranks.forkserver import FOLDER_VARIABLE
from workbench.ranks.history import as_one_call
from workbench.ranks.progress import Progress
from workbench.ranks.servers import describe_exit, fork_server
from workbench.rollout.client import Address, EngineClient
from workbench.rollout.handle import EngineHandle, EngineSpec, HostProcess
from workbench.rollout.host import TOKEN_BYTES, HostConfig

if TYPE_CHECKING:
    from workbench.ranks.cluster import Cluster

__all__ = ["MODES", "check_mode", "start_engine"]

MODES = ("rooted", "grouped", "independent")
_PRELOAD = {
    "vllm": ("vllm", "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "workbench.rollout.vllm_engine", "workbench.rollout.host"),
    "hf": ("transformers", "workbench.rollout.hf_engine", "workbench.rollout.host"),
}
_ENVIRONMENT = {"VLLM_CONFIGURE_LOGGING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_START_LIMIT_S = 300.0
_NOT_FOR_ENGINES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@as_one_call
def start_engine(
    cluster: Cluster,
    model: str | os.PathLike[str] = "tiny",
    mode: str = "rooted",
    *,
    tp: int = 1,
    kv_cache_bytes: int | None = None,
    backend: str = "vllm",
    dtype: str | None = None,
    max_model_len: int | None = None,
    device: str = "auto",
    seed: int = 0,
    engine_options: Mapping[str, Any] | None = None,
) -> EngineHandle:
    """Start an engine that belongs to a cluster.

    Args:
        model: "tiny" (bundled), a folder or a hub name.
        mode: "rooted", "grouped" or "independent"; see the module.
        tp: ranks that share one engine in grouped mode.
        kv_cache_bytes: of each process; None takes min(1 GiB, 10 % of what is free) / number of processes.
        backend: "vllm" or "hf".

    Returns:
        A handle, awake.

    Raises:
        ValueError: mode, tp or backend do not fit; nothing was started.
        EngineError: the model is not there, an option is unknown, the memory does not suffice, or the engine did not start.
    """
    if cluster.is_closed:
        raise ClusterClosed("the cluster is closed; its ranks have ended\nstart another: cluster = wb.launch(...)")
    check_mode(mode, tp, backend, cluster.world_size)
    models.path(model)
    spec = EngineSpec(
        model=str(model),
        mode=mode,
        tp=tp,
        backend=backend,
        kv_cache_bytes=kv_cache_bytes,
        dtype=dtype,
        max_model_len=max_model_len,
        device=device,
        seed=seed,
        engine_options=tuple(sorted((engine_options or {}).items())),
    )
    handle = _Starter(cluster, spec).start()
    cluster.own(handle.end, handle)
    return handle


def check_mode(mode: str, tp: int, backend: str, world_size: int) -> None:
    """Refuse what cannot be, before anything is started."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(map(repr, MODES))}")
    if backend not in _PRELOAD:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(map(repr, _PRELOAD))}")
    if isinstance(tp, bool) or not isinstance(tp, int) or tp < 1:
        raise ValueError(f"tp is {tp!r}; it must be an int of at least 1")
    if mode != "grouped" and tp != 1:
        raise ValueError(f"tp={tp} goes with mode='grouped'; mode {mode!r} has one process an engine")
    if mode == "grouped" and world_size % tp:
        raise ValueError(f"tp={tp} does not divide the {world_size} ranks into groups; choose a tp that divides {world_size}")
    if backend == "hf" and tp != 1:
        raise ValueError(f"tp={tp} needs backend='vllm'; transformers runs in one process here")


class _Starter:
    """The start of one engine: its processes, then their word that they stand. It outlives that, so it does not hold the cluster."""

    def __init__(self, cluster: Cluster, spec: EngineSpec) -> None:
        self.spec = spec
        self.world_size = cluster.world_size
        self.folder = cluster.folder
        self.history = cluster.history
        self.store_port = cluster.store_port
        self.identity = secrets.token_hex(4)
        self.exits: dict[int, int] = {}
        self.handle: EngineHandle | None = None

    def start(self) -> EngineHandle:
        ranks = [-1] if self.spec.mode == "rooted" else list(range(self.world_size))
        hosts: list[HostProcess] = []
        try:
            for index, rank in enumerate(ranks):  # one by one: an interrupt must find those that are there
                hosts.append(self._host(index, rank, len(ranks)))
            self._await(hosts)
        except BaseException:
            for host in hosts:  # nothing of an engine that has not started is worth waiting for
                host.end(0.0)
            raise
        self.handle = EngineHandle(self.spec, hosts, self.history)
        return self.handle

    def _host(self, index: int, rank: int, count: int) -> HostProcess:
        log = self.folder / f"engine-{self.identity}-{index}.log"
        address = str(self.folder / f"engine-{self.identity}-{index}.sock")
        config = HostConfig(
            backend=self.spec.backend,
            rank=rank,
            address=address,
            token=secrets.token_bytes(TOKEN_BYTES),
            tp_rank=index % self.spec.tp,
            tp=self.spec.tp,
            store_port=self.store_port,
            store_prefix=f"engine/{self.identity}/{index // self.spec.tp}",
            num_threads=max(1, num_usable_cores() // count),
            options=self._options(log, count),
        )
        ours, theirs = socket.socketpair()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        environment = {k: v for k, v in os.environ.items() if k not in _NOT_FOR_ENGINES}
        environment |= _ENVIRONMENT | {
            "GLOO_SOCKET_IFNAME": "lo",
            "VLLM_HOST_IP": "127.0.0.1",
            FOLDER_VARIABLE: str(self.folder),  # what it leaves goes with the cluster
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"),
        }
        ended: list[int] = []

        def on_exit(status: int) -> None:
            ended.append(status)
            self.exits[pid] = status
            if self.handle is not None:
                self.handle.ended(pid)

        try:
            server = fork_server(_PRELOAD[self.spec.backend], _ENVIRONMENT)
            pid = 0
            pid = server.spawn(
                "workbench.rollout.host:main", config, fds=[out, out, theirs.fileno()], environment=environment, on_exit=on_exit
            )
        finally:
            theirs.close()
            os.close(out)
        reach = Address(path=address, token=config.token, pid=pid, log_path=str(log))
        return HostProcess(rank=rank, client=EngineClient(ours, reach), address=reach, end=lambda grace_s: _end(pid, ours, ended, grace_s))

    def _options(self, log: Path, count: int) -> dict[str, Any]:
        spec = self.spec
        options: dict[str, Any] = {"model": spec.model, "device": spec.device, "backup_dir": None}
        if spec.backend == "hf":
            return {"model": spec.model}
        from workbench.rollout.vllm_engine import default_kv_cache_bytes

        options["kv_cache_bytes"] = spec.kv_cache_bytes if spec.kv_cache_bytes is not None else default_kv_cache_bytes(count)
        options |= {"dtype": spec.dtype, "max_model_len": spec.max_model_len, "seed": spec.seed, "log_path": str(log)}
        return {**options, "engine_options": dict(spec.engine_options)}

    def _await(self, hosts: list[HostProcess]) -> None:
        started = time.monotonic()
        with Progress() as progress:
            for host in hosts:
                while True:
                    try:
                        host.client.await_start(0.5)
                        break
                    except TimeoutError:
                        waited = time.monotonic() - started
                        if waited > _START_LIMIT_S:
                            raise EngineError(
                                f"the engine did not start within {_START_LIMIT_S:.0f} s\nits log is {host.address.log_path}\n"
                                "the ranks live on; try a smaller model or kv_cache_bytes"
                            ) from None
                        if waited > 2:
                            progress.show(
                                f"starting {self.spec.backend} with {self.spec.model}: {waited:.0f} s (log: {host.address.log_path})"
                            )
                    except EngineError as error:
                        status = self.exits.get(host.address.pid)
                        how = f"; it ended with {describe_exit(status)[1] or describe_exit(status)[0]}" if status else ""
                        raise EngineError(f"{error}{how}") from None


def _end(pid: int, sock: socket.socket, ended: list[int], grace_s: float) -> None:
    """Close our end; an engine that has not gone after grace_s is killed: its pid is ours until its exit was told."""
    sock.close()
    limit = time.monotonic() + grace_s
    while not ended and time.monotonic() < limit:
        time.sleep(0.01)
    if not ended:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        while not ended and time.monotonic() < limit + 3.0:
            time.sleep(0.01)
