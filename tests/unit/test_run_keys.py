"""The folder of run keys: what a process that died left in it is found and destroyed like the rest."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from repave.secrets import Sealer, write_private_files


def test_a_half_written_key_of_a_killed_service_is_found_as_its_runs_and_destroyed(tmp_path: Path) -> None:
    """The bug: it was taken for a run without a name, whose destruction failed and stopped the reconciler, the reaper with it, for good."""
    sealer = Sealer.open(tmp_path / "key")
    sealer.make_run_keys(["run-1", "run-2"])
    left = tmp_path / "run-keys/.run-3.new"
    left.write_bytes(b"half")
    sealer.destroy_run("run-2")
    found = sealer.list_keyed_runs(before=time.time() + 60)
    assert found == {"run-1", "run-3"}
    for run_id in found:
        sealer.destroy_run(run_id)
    assert list((tmp_path / "run-keys").iterdir()) == []


def test_keys_that_can_not_all_be_written_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_private_files({tmp_path / "a": b"1", tmp_path / "missing/b": b"2"})
    assert list(tmp_path.iterdir()) == []
