"""Sessions: saved with what each rank gave, run again elsewhere, and told where they differ; a session that is not one's own is not run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from workbench.cli import main
from workbench.ranks import history
from workbench.ranks import session as sessions
from workbench.ranks.cluster import Cluster
from workbench.ranks.digest import digest_of
from workbench.ranks.reproduce import compare
from workbench.ranks.session import Entry, Output


def world_mean(scale: float) -> torch.Tensor:
    import torch.distributed as dist

    x = torch.rand(4) * scale
    dist.all_reduce(x)
    return x / dist.get_world_size()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A session of everything that can be done to two ranks."""
    folder = tmp_path_factory.mktemp("session")
    with wb.launch(2, seed=3) as cluster:
        cluster.push({"offset": torch.arange(3.0)})
        cluster.execute("print('drawn by', rank)\ndrawn = torch.rand(2); drawn")
        cluster.run(world_mean, 2.0)
        cluster.use(wb.Layout(world_size=2, tp=2))
        cluster.execute("both = groups['tp'].all_reduce(drawn); object()", ranks="all")
        with pytest.raises(wb.RankFailed):
            cluster.execute("late = 1\n1 / (1 - rank)")
        with cluster.inject(wb.Fault(rank=0, op="all_reduce", action="corrupt", seed=2)):
            cluster.execute("spoiled = torch.ones(2); dist.all_reduce(spoiled); spoiled.tolist()")
        handle = cluster.execute("import time\nbefore = 1\nwhile True: time.sleep(0.01)", block=False)
        handle.wait(0.5)
        cluster.interrupt()
        handle.wait(10)
        cluster.pull("both")
        cluster.kill(1)
        cluster.respawn(1)
        cluster.execute("after = sorted(name for name in ('drawn', 'offset') if name in globals()); after")
        yield cluster.save_session(folder / "session.json")


def rewrite(path: Path, change: Callable[[dict], None], *, signed: bool = True) -> None:
    """Change a saved session, as somebody with (signed) or without this user's key could."""
    whole = json.loads(path.read_text())
    change(whole["session"])
    text = sessions._dump(whole["session"])
    whole["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    whole["signature"] = sessions._sign(text) if signed else "0" * 64
    path.write_text(json.dumps(whole))


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    path: Path = tmp_path / "session.json"
    path.write_bytes(saved.read_bytes())
    return path


def test_a_session_is_reproduced_with_its_names(saved, capsys):
    with wb.reproduce(saved) as cluster:
        report = cluster.report
        assert isinstance(cluster, Cluster) and report is not None and report.is_equal and report.first is None, str(report)
        assert cluster.pull("offset.tolist()", ranks=0) == [[0.0, 1.0, 2.0]] and cluster.pull("late + before", ranks=0) == [2]
        assert cluster.pull("after") == [["drawn", "offset"], []] and cluster.layout == wb.Layout(world_size=2, tp=2)
        assert not report.environment and report.num_cells == 14
    told = capsys.readouterr().out
    assert "14 cells run again" in told and "bit for bit: all equal" in told
    assert "note: cell 5: a result was compared by its text only: a builtins.object has no content that could be compared" in told


def test_the_first_output_that_differs_is_told_with_both_values(copy):
    def drop_the_scale(session):
        session["entries"][1]["text"] = session["entries"][1]["text"].replace("rand(2)", "rand(2) * (1 + rank)")

    rewrite(copy, drop_the_scale)
    with wb.reproduce(copy) as cluster:
        assert cluster.report is not None
        first = cluster.report.first
        assert first is not None and (first.cell, first.rank, first.what) == (2, 1, "result")
        assert first.then.startswith("tensor([") and first.now.startswith("tensor([") and first.then != first.now
        assert "cell 2 (print('drawn by', rank)), rank 1: result differs\n  then tensor([" in str(cluster.report)


def entry(stop: str = "", **output: Any) -> Entry:
    given = {"outcome": "ok", "text": "1", "digest": "a", "stdout": "one\n", "stdout_digest": "x"} | output
    return Entry(number=1, task="source", text="cell", ranks=(0,), stop=stop, outputs=(Output(rank=0, **given),))


@pytest.mark.parametrize(
    "now, what, told",
    [
        (entry(stdout="two\n", stdout_digest="y"), "stdout", ("'one\\n'", "'two\\n'")),
        (entry(stop="deadlock"), "end", ("it ended well", "it ended by deadlock")),
        (entry(stop="failure", outcome="raised", text="E: e"), "end", ("it ended well", "it ended by failure E: e")),
        (entry(outcome="raised", text="E: e"), "outcome", ("ok 1", "raised E: e")),
        (entry(text="2", digest="b"), "result", ("1 (hash a)", "2 (hash b)")),
        (entry(digest=""), "result", ("1 (hash a)", "1 (hash none)")),
    ],
)
def test_each_kind_of_difference_has_both_sides(now, what, told):
    (found,), *_ = compare([(entry(), now)])
    assert (found.cell, found.rank, found.what, found.then, found.now) == (1, 0, what, *told)


def test_what_is_no_difference():
    address = entry(text="<object at 0x7f01aabbcc>", digest="", reason="no content")
    again = entry(text="<object at 0x7f02ddeeff>", digest="", reason="no content")
    assert compare([(entry(), entry()), (address, again)]) == ([], 2, 1, ["cell 2: a result was compared by its text only: no content"])
    assert compare([(entry(stop="interrupt"), entry(stop="timeout", text="2")), (entry(outcome="freed"), entry())])[0] == []


def test_a_session_of_another_user_is_read_but_not_run(copy, tmp_path, capsys):
    rewrite(
        copy,
        lambda session: session["entries"].insert(0, dict(session["entries"][1], text=f"open({str(tmp_path / 'ran')!r}, 'w')")),
        signed=False,
    )
    with pytest.raises(wb.SessionError, match="was not saved by this user on this machine\nto reproduce a session is to run its code"):
        wb.reproduce(copy)
    assert main(["reproduce", str(copy)]) == 1 and "read it first: workbench reproduce --show" in capsys.readouterr().err
    assert main(["reproduce", "--show", str(copy)]) == 0 and "open(" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()
    with wb.reproduce(copy, trust=True):
        assert (tmp_path / "ran").exists()


def test_what_is_shown_hides_nothing(copy, capsys):
    rewrite(copy, lambda session: session["entries"][1].update(text="import os\x1b[2K\rprint('harmless')"), signed=False)
    assert main(["reproduce", "--show", str(copy)]) == 0
    told = capsys.readouterr().out
    assert "import os\\x1b[2K" in told and "\x1b" not in told


def test_the_command_tells_equal_from_different(copy, capsys):
    assert main(["reproduce", str(copy)]) == 0 and "all equal" in capsys.readouterr().out
    rewrite(copy, lambda session: session["launch"].update(seed=4))
    assert main(["reproduce", str(copy)]) == 3
    assert "differ, the first one in\ncell 2 (print('drawn by', rank)), rank 0: result differs" in capsys.readouterr().out


def test_other_versions_are_listed(copy):
    def age(session):
        session["environment"]["versions"]["torch"] = "1.0"
        session["entries"] = session["entries"][:1]

    rewrite(copy, age)
    with wb.reproduce(copy) as cluster:
        assert cluster.report is not None
        assert cluster.report.environment == (f"torch 1.0 then, {torch.__version__} now",)
        assert f"other than then: torch 1.0 then, {torch.__version__} now" in str(cluster.report)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda path: path.unlink(), "there is no session at .*\nsave one: cluster.save_session"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "is no session, or is cut short: .*\nsave it again"),
        (
            lambda path: path.write_text(path.read_text().replace("drawn by", "drawn at")),
            "is damaged, or was edited: it does not match its",
        ),
        (
            lambda path: path.write_text(path.read_text().replace("session 1", "session 9")),
            "its format is 'workbench session 9', not 'workbench",
        ),
        (lambda path: path.write_text("[1, 2]"), "is no session that workbench .* reads\nits format is 'list'"),
        (lambda path: rewrite(path, lambda session: session.pop("layout")), "is damaged: TypeError: .*'layout'"),
        (
            lambda path: rewrite(path, lambda session: session["launch"].update(world_size=0)),
            "cannot be launched as it says: world_size is 0",
        ),
        (
            lambda path: rewrite(path, lambda session: session["launch"].update(ranks=2)),
            "cannot be launched as it says: .*'ranks'\nit says",
        ),
        (lambda path: path.write_text(json.dumps({"format": "workbench session 1"})), "is damaged: KeyError: 'session'"),
    ],
)
def test_a_file_that_is_no_good_is_told(copy, change, told):
    change(copy)
    with pytest.raises(wb.SessionError, match=told):
        wb.reproduce(copy)


def test_a_cell_that_cannot_be_run_is_noted_and_the_others_run(copy):
    def spoil(session):
        session["entries"] = session["entries"][:3]
        session["entries"][0]["task"] = "dance"
        session["entries"][2]["value"] = "gone"

    rewrite(copy, spoil)
    with wb.reproduce(copy) as cluster:
        assert cluster.report is not None and cluster.report.num_cells == 1 and cluster.pull("drawn.numel()") == [2, 2]
        assert cluster.report.notes[:2] == ("cell 1 could not be run: KeyError: 'dance'", "cell 3 could not be run: KeyError: 'gone'")


def test_a_history_has_an_end(monkeypatch, tmp_path):
    monkeypatch.setattr(history, "_MOST_OUTPUTS", 3)
    with wb.launch(2) as cluster:
        for number in range(4):
            cluster.execute(f"x = {number}")
        session = sessions.read_session(cluster.save_session(tmp_path / "session.json"))
    assert [entry.text for entry in session.entries] == ["x = 0", "x = 1"]
    assert session.notes == ("2 cells after the first 2 are not in this session",)


def test_a_file_of_somebody_elses_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with wb.launch(1) as cluster:
        with pytest.raises(wb.SessionError, match="is there already and is no session\nit was left as it is\nchoose another path"):
            cluster.save_session(tmp_path / "notes.txt")
        path = cluster.save_session(tmp_path / "deeper" / "session")
        assert cluster.save_session(path) == path and path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(wb.SessionError, match="the session was not written to .*\nchoose a folder that can be written"):
            cluster.save_session(tmp_path / "notes.txt" / "below")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_values_too_large_for_a_session_are_named(tmp_path):
    with wb.launch(1) as cluster:
        cluster.push({"large": torch.zeros(5_000_000)})
        cluster.execute("float(large.sum())")
        path = cluster.save_session(tmp_path / "session.json")
    assert path.stat().st_size < 100_000
    with wb.reproduce(path) as cluster:
        assert cluster.report is not None
        assert cluster.report.notes[:2] == (
            "cell 1, push: 19 MiB are more than a session keeps",
            "cell 1 could not be run: WorkbenchError: push was not kept: 19 MiB are more than a session keeps",
        )
        assert cluster.report.first is not None and "NameError: name 'large' is not defined" in cluster.report.first.now


def test_the_key_is_of_this_user_only(saved):
    path = Path(os.environ["WORKBENCH_HOME"]) / "session.key"
    assert path.stat().st_mode & 0o777 == 0o600 and len(path.read_bytes()) == 32
    path.chmod(0o644)
    try:
        with pytest.raises(wb.SessionError, match="session.key can be read by others"):
            wb.reproduce(saved)
    finally:
        path.chmod(0o600)


def test_rollouts_and_engines_are_run_again(tmp_path):
    sampling = wb.Sampling(max_tokens=6, temperature=1.0, seed=5)
    with wb.launch(2) as cluster:
        engine = wb.start_engine(cluster, backend="hf")
        run = wb.rollout(cluster, [["1+1="], ["2+3=", "4+4="]], engine=engine, sampling=sampling, keep=False)
        cluster.execute("texts = batch.texts; texts")
        path = cluster.save_session(tmp_path / "session.json")
    with wb.reproduce(path) as cluster:
        assert cluster.report is not None and cluster.report.is_equal and cluster.report.num_cells == 3, str(cluster.report)
        assert cluster.pull("texts") == [run.batch(0).texts, run.batch(1).texts]
    _, rolled, _ = sessions.read_session(path).entries
    assert rolled.outputs[0].digest == digest_of(run).value != digest_of(wb.Run(batches={0: {0: run.batch(0)}})).value
    assert rolled.outputs[0].text == repr(run)
