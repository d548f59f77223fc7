"""An older database that was put back is recognised; a crash between the two places never locks anybody out."""

import itertools
import os
import time

import pytest

from repave.domain.generation import Stand, Verdict, judge
from repave.errors import RepaveError
from repave.generation import read_stand_file, write_stand_file
from repave.secrets import Sealer


@pytest.mark.parametrize(
    ("file", "database", "verdict"),
    [
        (None, None, Verdict.FIRST),
        (Stand(3, 70), Stand(3, 70), Verdict.CURRENT),
        (Stand(3, 70), Stand(4, 70), Verdict.CURRENT),  # died after the database, before the file
        (Stand(3, 70), Stand(3, 71), Verdict.CURRENT),
        (Stand(3, 70), Stand(3, 69), Verdict.OLD),  # a copy from this very life, before the last fact
        (Stand(3, 70), Stand(2, 99), Verdict.OLD),  # another branch of history, however long it ran
        (Stand(3, 70), None, Verdict.OLD),  # an empty database, or one from before there were generations
        (None, Stand(1, 1), Verdict.UNKNOWN),  # put on another machine without the file
    ],
)
def test_only_a_database_as_new_as_the_file_is_worked_with(file, database, verdict):
    assert judge(file, database) is verdict


def test_whoever_dies_between_any_two_writes_may_start_again():
    """The database is written first, at each start, restore and fact; the process may die before the file follows."""
    steps = ("start", "fact", "restore")
    for history in itertools.product(steps, repeat=4):
        for follows in itertools.product((True, False), repeat=4):
            file = database = Stand(1, 0)
            for step, followed in zip(history, follows, strict=True):
                assert judge(file, database) is Verdict.CURRENT
                above = max(file.generation, database.generation)
                database = Stand(database.generation, database.events + 1) if step == "fact" else Stand(above + 1, database.events)
                file = database if followed else file
            assert judge(file, database) is Verdict.CURRENT


def test_the_file_never_goes_back(tmp_path):
    path = tmp_path / "generation"
    for stand in (Stand(2, 5), Stand(1, 9), Stand(2, 4)):
        write_stand_file(path, stand)
    assert read_stand_file(path) == Stand(2, 5)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_file_is_refused_not_taken_for_none(tmp_path):
    (tmp_path / "generation").write_bytes(b"\x00\x00")
    with pytest.raises(RepaveError) as refused:
        read_stand_file(tmp_path / "generation")
    assert refused.value.slug == "old-state"


def test_a_half_written_run_key_of_a_dead_process_is_swept_and_stops_nothing(tmp_path):
    """The bug: its name began with a dot, the sweep took it for the folder itself, failed, and with it every later round of the reconciler."""
    sealer = Sealer.open(tmp_path / "key")
    half = tmp_path / "run-keys" / ".0198-aa.new"
    half.write_bytes(b"half")
    os.utime(half, (1, 1))
    old = sealer.list_old_runs(before=time.time() - 3600)
    assert old == {"0198-aa"}
    for run in old:
        sealer.destroy_run(run)
    assert list((tmp_path / "run-keys").iterdir()) == []
