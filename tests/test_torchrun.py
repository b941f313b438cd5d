"""Our groups in a script under torchrun, without a driver, beside accelerate; and under SLURM's names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.ranks.stateless import free_port

SCRIPT = """
import pathlib
import torch, torch.distributed as dist
import workbench as wb
from workbench.ranks.forming import form_groups

me = wb.current()
assert me.world_size == 2 and me.group.all_reduce(torch.ones(1)).item() == 2.0
groups = form_groups(wb.Layout(2, tp=2))
assert groups["tp"].all_gather_object(me.rank) == [0, 1] and groups["dp"].world_size == 1
assert wb.reduce_metrics({"loss": float(me.rank)}) == {"loss": 0.5}
ACCELERATE
print(f"rank {me.rank} is well")
dist.barrier()
dist.destroy_process_group()
names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
assert "pt_gloo_runloop" not in names, names  # one that lets go of a tensor while the interpreter ends aborts it
try:
    me.group.all_gather_object(me.rank)
except wb.StaleGroupError as error:
    assert "group 'world' belongs to an older generation of the world" in str(error)
"""

ACCELERATE = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2 and accelerator.process_index == me.rank
assert accelerator.gather(torch.tensor([me.rank])).tolist() == [0, 1]
assert groups["tp"].all_gatherv(torch.full((me.rank,), 7)).tolist() == [7]
"""

SLURM = """
import os
assert os.environ["RANK"] == os.environ["LOCAL_RANK"] == str(me.rank) and os.environ["WORLD_SIZE"] == "2"
"""


def test_a_script_under_torchrun_attaches_and_stands_beside_accelerate(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("ACCELERATE", ACCELERATE))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 is well" in done.stdout and "rank 1 is well" in done.stdout


@pytest.mark.parametrize("names", [("SLURM_PROCID", "SLURM_NTASKS")])
def test_a_script_under_slurms_names_attaches(tmp_path: Path, names: tuple[str, str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("ACCELERATE", SLURM + ACCELERATE))
    port = str(free_port())
    processes = []
    for rank in range(2):
        slurm = {names[0]: str(rank), names[1]: "2", "SLURM_LOCALID": str(rank)}
        env = {**os.environ, **slurm, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen([sys.executable, script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), told
    assert ["rank 0 is well" in told[0][0], "rank 1 is well" in told[1][0]] == [True, True]


def test_a_world_that_current_made_ends_before_the_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit\n"
        "atexit.register(lambda: print('left:', dist.is_initialized()))  # runs last\n"
        "import torch.distributed as dist, workbench as wb\n"
        "print(wb.current().group.all_gather_object('well'))\n"
    )
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "['well']\nleft: False\n"), done.stderr


@pytest.mark.parametrize(
    ("env", "seen"), [({}, "they are not set"), ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "MASTER_ADDR is not set")]
)
def test_a_process_that_is_no_rank_is_told_what_is_missing(env: dict[str, str], seen: str) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    done = subprocess.run(
        [sys.executable, "-c", "import workbench as wb; wb.current()"], capture_output=True, text=True, timeout=60, env={**plain, **env}
    )
    assert "WorkbenchError: wb.current() was called in a process that is no rank" in done.stderr and seen in done.stderr
    assert "call it inside cluster.run(...) or a %%ranks cell, or start the script with torchrun" in done.stderr
