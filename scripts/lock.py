"""Print a lock: every package that the extras `<device>`, `common` and `dev` of pyproject.toml need, each pinned to one version.

    .venv/bin/python scripts/lock.py cpu > requirements/cpu.lock
    .venv/bin/python scripts/lock.py gpu > requirements/gpu.lock

cpu: the versions installed in the environment that runs this, found by following the packages' own metadata, but never into `LEFT_OUT`.
So a new version is tried by installing it by hand, running the tests, and writing the lock again.
gpu: what pip would install for this Python with what both locks share held at the CPU lock's versions; nothing is installed.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {  # builds for CUDA wherever they come from an ordinary index; beside a CPU torch `import transformers` then ends in
    "torchaudio",  # "operator torchvision::nms does not exist"
    "torchcodec",
    "torchvision",
}


def requirements(device: str) -> list[Requirement]:
    """What the extras of one device ask for, the project's own name left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    found = [Requirement(line) for extra in ("common", device, "dev") for line in extras[extra]]
    return [requirement for requirement in found if requirement.name != project["name"]]


def installed_versions(roots: list[Requirement]) -> dict[str, str]:
    """Canonical name -> installed version of everything that `roots` need here.

    Raises:
        PackageNotFoundError: something needed is not installed.
    """
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = list(roots)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        wanted = [extra for extra in ("", *sorted(requirement.extras)) if (name, extra) not in seen]
        if name in LEFT_OUT or not wanted:
            continue
        seen.update((name, extra) for extra in wanted)
        found = distribution(name)
        versions[name] = found.version
        for needed in map(Requirement, found.requires or []):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in wanted):
                todo.append(needed)
    return versions


def resolved_versions(roots: list[Requirement]) -> dict[str, str]:
    """Canonical name -> version that pip chooses for `roots`, nothing installed.

    Raises:
        CalledProcessError: pip finds no set of versions; its own words are on stderr.
    """
    shared = {canonicalize_name(root.name) for root in roots} & {canonicalize_name(root.name) for root in requirements("cpu")} - {"torch"}
    pins = [line for line in (ROOT / "requirements" / "cpu.lock").read_text().splitlines() if line.split("==")[0] in shared]
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraints.write_text("\n".join(pins))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--only-binary", ":all:"]
        subprocess.run([*command, "--report", str(report), "-c", str(constraints), *map(str, roots)], check=True, stdout=sys.stderr)
        chosen = json.loads(report.read_text())["install"]
    return {canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"] for item in chosen}


def main(device: str) -> None:
    roots = requirements(device)
    versions = installed_versions(roots) if device == "cpu" else resolved_versions(roots)
    how = {"cpu": f"the versions it ran with; left out: {', '.join(sorted(LEFT_OUT))}", "gpu": "resolved by pip, run nowhere yet"}
    print(f"# The whole environment of DEVICE={device}, for `pip install --no-deps` (make setup does it): {how[device]}.")
    print(f"# Made by scripts/lock.py {device}, Python {platform.python_version()}, {platform.system()} {platform.machine()}.")
    print(f"torch=={versions.pop('torch')}")
    print("\n".join(f"{name}=={version}" for name, version in sorted(versions.items())))


if __name__ == "__main__":
    main(sys.argv[1])
