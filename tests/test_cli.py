"""The commands: what each calls, what is said when it cannot, and the exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest

import workbench
from workbench import cli
from workbench.errors import WorkbenchError


def use_command(monkeypatch, *, raises: BaseException | None = None, code: int = 0) -> list[list[str]]:
    """Put a command "probe" into the table; the list that comes back gets its arguments."""
    calls: list[list[str]] = []

    def probe(argv):
        calls.append(list(argv))
        if raises is not None:
            raise raises
        return code

    monkeypatch.setattr(cli, "probe", probe, raising=False)
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command(home="workbench.cli:probe", does="probes"))
    return calls


def test_arguments_after_the_command_are_its_own(monkeypatch):
    calls = use_command(monkeypatch, code=3)
    assert cli.main(["probe", "--out", "x", "--help"]) == 3
    assert calls == [["--out", "x", "--help"]]


def test_a_refusal_is_told_without_a_traceback(monkeypatch, capsys):
    use_command(monkeypatch, raises=WorkbenchError("no engine\nneeded: one\nstart one"))
    assert cli.main(["probe"]) == 1
    assert capsys.readouterr().err == "workbench probe: no engine\nneeded: one\nstart one\n"


def test_what_nobody_expected_keeps_its_traceback(monkeypatch):
    use_command(monkeypatch, raises=KeyError("x"))
    with pytest.raises(KeyError):
        cli.main(["probe"])


def test_an_interrupt_is_told_in_one_line(monkeypatch, capsys):
    use_command(monkeypatch, raises=KeyboardInterrupt())
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "workbench probe: interrupted\n"


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"  {name} " in told and command.does in told for name, command in cli.COMMANDS.items())


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 2
    assert "workbench COMMAND" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_those_that_are_there(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["dmeo"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "'dmeo'" in told and "'demo'" in told


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"workbench {workbench.__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_where_the_table_says(name):
    module, _, function = cli.COMMANDS[name].home.partition(":")
    assert callable(getattr(import_module(module), function))


def test_the_table_is_quick_to_read():
    code = "import sys, workbench.cli; print([n for n in ('torch', 'vllm', 'pandas', 'matplotlib', 'rich') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["lab", "bench"])
def test_what_belongs_to_the_checkout_says_so_where_there_is_none(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "_CHECKOUT", tmp_path)
    assert cli.main([name]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"workbench {name}: ") and str(tmp_path) in told
    assert "not of the installed package" in told and "clone the repository" in told


def test_bench_runs_the_benchmarks_of_the_checkout(monkeypatch, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "run.py").write_text("def main(argv):\n    return len(argv)\n")
    monkeypatch.setattr(cli, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["bench", "--only", "launch"]) == 2
    for name in ("benchmarks", "benchmarks.run"):
        sys.modules.pop(name, None)


def test_lab_listens_on_loopback_and_shows_the_notebooks(monkeypatch, tmp_path):
    (tmp_path / "notebooks").mkdir()
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(os, "execv", lambda path, argv: seen.append(argv))
    cli.main(["lab", "--no-browser"])
    (argv,) = seen
    assert argv[:3] == [sys.executable, "-m", "jupyterlab"] and argv[-1] == "--no-browser"
    assert "--ip=127.0.0.1" in argv and f"--ServerApp.root_dir={tmp_path / 'notebooks'}" in argv
    assert ("--allow-root" in argv) == (os.getuid() == 0)
