"""What a manifest says about how a run was made."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

import workbench as wb
from workbench.environment import describe_environment, fingerprint_model


def test_versions_machine_and_variables_are_told_as_plain_json(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    told = describe_environment()
    assert told["versions"]["torch"] == metadata.version("torch") and told["versions"]["workbench"] == wb.__version__
    assert told["environment"]["OMP_NUM_THREADS"] == "3" and told["machine"]["memory_bytes"] > 2**28
    assert json.loads(json.dumps(told)) == told


def test_secrets_and_other_variables_are_left_out(monkeypatch):
    for name in ("VLLM_API_KEY", "HF_HUB_TOKEN", "WORKBENCH_SECRET", "HOME_ADDRESS"):
        monkeypatch.setenv(name, "private")
    assert "private" not in json.dumps(describe_environment())


def write_model(folder: Path, *, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_equal_models_have_equal_fingerprints_and_changed_ones_differ(tmp_path):
    weights = bytes(3 * 2**20)
    one = fingerprint_model(write_model(tmp_path / "a", weights=weights))
    assert one == fingerprint_model(write_model(tmp_path / "b", weights=weights)) and len(one) == 16
    changed = [b"\1" + weights[1:], weights[:-1] + b"\1", weights + b"\0"]
    others = {fingerprint_model(write_model(tmp_path / f"c{i}", weights=w)) for i, w in enumerate(changed)}
    assert len(others | {one}) == 4


def test_an_empty_folder_has_no_fingerprint(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder is empty"):
        fingerprint_model(tmp_path)
