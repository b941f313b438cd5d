"""A real Jupyter kernel for tests: what a front end would send, and what it would get."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.manager import start_new_kernel


@dataclass
class Ran:
    """What one cell gave."""

    status: str = ""
    seconds: float = 0.0
    messages: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    others: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)  # (request, kind, content) of what came for other requests

    @property
    def streamed(self) -> str:
        return "".join(content["text"] for _, kind, content in self.messages if kind == "stream")

    @property
    def shown(self) -> list[tuple[float, dict[str, str]]]:
        """(seconds, bundle) of everything displayed, replacements too."""
        return [(at, content["data"]) for at, kind, content in self.messages if kind.endswith(("display_data", "execute_result"))]

    @property
    def error(self) -> str:
        return "\n".join(line for _, kind, content in self.messages if kind == "error" for line in content["traceback"])


class Kernel:
    """One kernel and its client."""

    def __init__(self) -> None:
        self.manager, self.client = start_new_kernel(kernel_name="python3", extra_arguments=["--IPKernelApp.log_level=ERROR"])

    @property
    def pid(self) -> int:
        provisioner: Any = self.manager.provisioner
        return int(provisioner.pid)

    def send(self, code: str) -> str:
        return str(self.client.execute(code))

    def run(self, code: str, *, timeout_s: float = 60.0, interrupt_after_s: float | None = None) -> Ran:
        """Run a cell to its end; with `interrupt_after_s` press the stop button then."""
        return self.collect(self.send(code), timeout_s=timeout_s, interrupt_after_s=interrupt_after_s)

    def collect(self, sent: str, *, timeout_s: float = 60.0, interrupt_after_s: float | None = None) -> Ran:
        ran, started = Ran(), time.monotonic()
        while time.monotonic() - started < timeout_s:
            since = time.monotonic() - started
            if interrupt_after_s is not None and since > interrupt_after_s:
                self.manager.interrupt_kernel()
                interrupt_after_s = None
            try:
                message = self.client.get_iopub_msg(timeout=0.05)
            except queue.Empty:
                continue
            if (request := message["parent_header"].get("msg_id", "")) != sent:
                ran.others.append((request, message["msg_type"], message["content"]))
                continue
            ran.messages.append((time.monotonic() - started, message["msg_type"], message["content"]))
            if message["content"].get("execution_state") == "idle":
                ran.seconds = time.monotonic() - started
                ran.status = self.reply(sent)["status"]
                return ran
        raise AssertionError(f"the cell did not end within {timeout_s} s; so far: {ran.messages[-3:]}")

    def reply(self, sent: str) -> dict[str, Any]:
        while True:
            message = self.client.get_shell_msg(timeout=10)
            if message["parent_header"].get("msg_id") == sent:
                return dict(message["content"])

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()
