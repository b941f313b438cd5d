"""Make the project's environment, once: `.venv` with everything in a lock, the package itself (editable) and the notebook kernel.

    python3 scripts/setup.py [--device auto|cpu|gpu]        (what `make setup` calls)

    lock, device, Python -> key;  .venv/workbench-stamp.json holds that key?  yes: nothing to do (0.1 s)
                                                                              no: remove .venv, build it in place, stamp it last

An interrupted build has no stamp, so the next call starts again. Knows pip and venv only: the standard library is all it needs.
Read by old Pythons too, up to the check of the version, so nothing above that line may need a new one.
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time

OLDEST, NEWEST, OLDEST_GLIBC = (3, 11), (3, 13), (2, 34)  # cryptography and debugpy are built for glibc 2.34
if not OLDEST <= sys.version_info[:2] <= NEWEST:
    sys.exit(
        "setup: this is Python {}.{}.{}; ".format(*sys.version_info)
        + "3.11, 3.12 or 3.13 is needed; install one and name it: make PYTHON=python3.11"
    )

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAMP, MARK = "workbench-stamp.json", "made-by-workbench"
NEEDED_GB = {"cpu": 8, "gpu": 20}  # the environment (4.2 and about 11 GB) and what pip keeps while it works
DRIVER_FILES = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1")  # Linux; WSL2
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # the only public home of torch's "+cpu" builds
UNREACHABLE = ("connection broken by", "Max retries exceeded", "NewConnectionError", "ConnectTimeout", "Name or service not known")


class SetupError(Exception):
    """Set-up cannot go on; the text is one line: what happened, what was needed, what to do."""


class Pip:
    """pip of one environment: prints how far it is, keeps its whole output in a log, turns failures into one line."""

    def __init__(self, venv: str) -> None:
        self.python = os.path.join(venv, "bin", "python")
        self.log = os.path.join(ROOT, ".workbench", "setup.log")
        os.makedirs(os.path.dirname(self.log), exist_ok=True)

    def install(self, *arguments: str, num_packages: int = 1) -> None:
        """Run `pip install --no-deps`, wheels only.

        Raises:
            SetupError: pip failed.
        """
        command = [self.python, "-m", "pip", "install", "--no-deps", "--only-binary", ":all:", "--no-compile", "--progress-bar", "off"]
        process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT
        )
        output = self._follow(process, num_packages)
        if process.wait() != 0:
            raise SetupError(f"{explain(output)} (pip's own words: {self.log})")

    def _follow(self, process: "subprocess.Popen[str]", num_packages: int) -> str:
        lines, num_found, is_fetched, started = [], 0, False, time.monotonic()
        said = started
        assert process.stdout is not None
        with open(self.log, "a") as log:
            for line in process.stdout:
                log.write(line)
                lines.append(line)
                num_found += line.startswith(("Collecting ", "Processing ", "Obtaining ", "Requirement already"))
                if line.startswith("Installing collected"):
                    is_fetched = True
                    say(f"  {num_found} of {num_packages} packages fetched, {time.monotonic() - started:.0f} s; installing")
                elif not is_fetched and time.monotonic() - said > 10:
                    said = time.monotonic()
                    say(f"  {num_found} of {num_packages} packages fetched, {said - started:.0f} s")
        return "".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


def explain(output: str) -> str:
    """One line for what pip printed when it failed."""
    if "No space left on device" in output:
        return "the disk filled up while pip installed; free some space, or point TMPDIR to a larger disk"
    asked = [line.split("requirement ", 1)[1].split(" (from")[0] for line in output.splitlines() if "satisfies the requirement" in line]
    name = asked[-1] if asked else "a package"
    if any(sign in output for sign in UNREACHABLE):
        return f"the package index did not answer when asked for {name}; check network, HTTPS_PROXY and `pip config list`"
    if asked:
        here = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
        return f"no wheel of {name} for {here} where pip looks; try another Python (make PYTHON=python3.11) or mend the lock"
    errors = [line for line in output.splitlines() if line.startswith("ERROR")]
    return "pip failed: {}; call again, or remove .venv first".format(errors[-1] if errors else "no error line")


def chosen_device(asked: str) -> str:
    """"cpu" or "gpu"; `auto` looks for the NVIDIA driver and says what it found."""
    if asked != "auto":
        return asked
    found = [path for path in DRIVER_FILES if os.path.exists(path)]
    device = "gpu" if found else "cpu"
    say(f"setup: DEVICE=auto chose {device}: " + (f"NVIDIA driver seen in {found[0]}" if found else "no NVIDIA driver"))
    return device


def lock_path(device: str) -> str:
    return os.path.join(ROOT, "requirements", device + ".lock")


def lock_lines(device: str) -> "list[str]":
    """The pins of a lock, "name==version"."""
    with open(lock_path(device)) as file:
        return [line.strip() for line in file if line.strip() and not line.startswith("#")]


def digest(*paths: str) -> str:
    whole = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            whole.update(file.read())
    return whole.hexdigest()


def key(venv: str, device: str, python: str) -> "dict[str, str]":
    """What a finished environment is known by; it holds absolute paths, so a moved one is another one."""
    return {"lock": digest(lock_path(device)), "device": device, "python": python, "venv": venv}


def package_key() -> str:
    return digest(os.path.join(ROOT, "pyproject.toml"))


def stamped(venv: str) -> "dict[str, str]":
    """The stamp of a finished environment, {} where there is none or its Python is gone."""
    try:
        with open(os.path.join(venv, STAMP)) as file:
            stamp = json.load(file)
        return dict(stamp) if os.path.exists(os.path.join(venv, "bin", "python")) else {}
    except (OSError, ValueError):
        return {}


def write_stamp(venv: str, stamp: "dict[str, str]") -> None:
    path = os.path.join(venv, STAMP)
    with open(path + ".new", "w") as file:
        json.dump(stamp, file, indent=1)
    os.replace(path + ".new", path)


def check_machine(venv: str, device: str) -> None:
    """What can be known before anything is written.

    Raises:
        SetupError: another system, a folder that is not ours, no ensurepip, or too little space.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SetupError(f"this is {platform.system()} {platform.machine()}; Linux x86-64 (WSL2 too) is needed; use such a machine")
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(map(int, version.split("."))) < OLDEST_GLIBC:
        raise SetupError(f"the C library is {libc or 'no glibc'} {version}; glibc 2.34 is needed; use Debian 12, Ubuntu 22.04 or later")
    if not is_ours(venv):
        raise SetupError(f"{venv} was not made by this set-up, so it stays as it is; move it away, or choose another: make VENV=.venv-mine")
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        raise SetupError("this Python has no ensurepip, which venv needs; install it (Debian, Ubuntu: apt install python3-venv)") from None
    needed = float(os.environ.get("WORKBENCH_MIN_FREE_GB", NEEDED_GB[device]))
    free = shutil.disk_usage(os.path.dirname(venv)).free / 1e9
    if free < needed:
        raise SetupError(f"{free:.1f} GB are free beside {venv}; {needed:g} GB are needed for DEVICE={device}; free some")


def is_ours(venv: str) -> bool:
    """Whether this script may empty the folder: it made it, or there is nothing in it."""
    if not os.path.lexists(venv):
        return True
    return os.path.isdir(venv) and (os.path.exists(os.path.join(venv, MARK)) or not os.listdir(venv))


def build(venv: str, device: str) -> None:
    """Make the environment from nothing.

    Raises:
        SetupError: it did not work; nothing is left of it.
    """
    check_machine(venv, device)
    if os.path.exists(venv):
        say(f"setup: {venv} is unfinished or out of date; making it anew")
        clear(venv)
    say(f"setup: making {venv} for DEVICE={device} with Python {platform.python_version()}")
    os.makedirs(venv, exist_ok=True)
    with open(os.path.join(venv, MARK), "w") as file:
        file.write("scripts/setup.py may remove this folder and make it again\n")
    try:
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        install_lock(venv, device)
        install_package(venv)
    except (SetupError, OSError, subprocess.CalledProcessError) as error:
        clear(venv)
        shutil.rmtree(venv, ignore_errors=True)
        raise SetupError(str(error)) from error


def clear(venv: str) -> None:
    """Empty a folder of ours; the stamp goes first and the mark stays, so that a call killed here leaves nothing trusted or foreign."""
    for name in sorted(os.listdir(venv), key=lambda name: name != STAMP):
        path = os.path.join(venv, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        elif name != MARK:
            os.remove(path)


def install_lock(venv: str, device: str) -> None:
    """Everything in the lock: torch first, since its "+cpu" build may have to come from PyTorch's own index."""
    lines = lock_lines(device)
    pip = Pip(venv)
    torch = [line for line in lines if line.startswith("torch==")]
    if torch:
        try:
            pip.install(*torch)
        except SetupError:
            if "+cpu" not in torch[0]:
                raise
            say(f"  {torch[0]} is not where pip looks; asking PyTorch's own index")
            pip.install("--index-url", TORCH_CPU_INDEX, *torch)
    pip.install("-r", lock_path(device), num_packages=len(lines))
    say("  compiling, a minute or so")  # by all cores, where pip uses one; few of the many models are ever loaded; templates may fail
    command = [pip.python, "-W", "ignore", "-m", "compileall", "-q", "-j", "0", "-x", "/(tests|testing|models)/", os.path.join(venv, "lib")]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)


def install_package(venv: str) -> None:
    """The package, editable, with nothing fetched; and its kernel, seen by JupyterLab in this environment and by editors that use it."""
    pip = Pip(venv)
    pip.install("--no-index", "--no-build-isolation", "--editable", ROOT)
    folder = os.path.join(venv, "share", "jupyter", "kernels", "workbench")
    os.makedirs(folder, exist_ok=True)
    argv = [os.path.join(venv, "bin", "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Workbench", "language": "python", "metadata": {"debugger": True}}
    with open(os.path.join(folder, "kernel.json"), "w") as file:
        json.dump(spec, file, indent=1)


def is_done(stamp: "dict[str, str]", venv: str, device: str, any_python: bool) -> bool:
    """Whether the stamp stands for what is asked now; no device asked: the one that is there will do."""
    device = device or stamp.get("device", "")
    if device not in NEEDED_GB:
        return False
    python = stamp.get("python", "") if any_python else platform.python_version()
    return {name: stamp.get(name) for name in key(venv, device, "")} == key(venv, device, python)


def set_up(venv: str, asked: str, any_python: bool) -> None:
    """Bring the environment to where the lock, the device and pyproject.toml say; see the module's drawing."""
    stamp = stamped(venv)
    device = chosen_device(asked) if asked else ""
    if not is_done(stamp, venv, device, any_python):
        started = time.monotonic()
        device = device or chosen_device("auto")
        build(venv, device)
        write_stamp(venv, {**key(venv, device, platform.python_version()), "package": package_key()})
        say(f"setup: ready after {time.monotonic() - started:.0f} s")
    elif stamp.get("package") != package_key():
        install_package(venv)
        write_stamp(venv, {**stamp, "package": package_key()})


def main(arguments: "list[str]") -> int:
    parser = argparse.ArgumentParser(prog="setup", description="Make the project's environment, once.")
    parser.add_argument("--device", default="", choices=["", "auto", "cpu", "gpu"], help="default: what is there, else auto")
    parser.add_argument("--venv", default=".venv", help="folder of the environment, from the project's root")
    parser.add_argument("--any-python", action="store_true", help="a finished environment of another Python will do")
    options = parser.parse_args(arguments)
    root = os.open(ROOT, os.O_RDONLY)
    fcntl.flock(root, fcntl.LOCK_EX)  # two calls at once: the second waits, then finds it done
    try:
        set_up(os.path.join(ROOT, options.venv), options.device, options.any_python)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; the next call starts again", file=sys.stderr)
        return 1
    finally:
        os.close(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
