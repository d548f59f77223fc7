"""Which disk is the root disk: the rule refuses rather than guesses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repave.domain.root_disk import choose_root_disk, is_candidate, parse_hints
from repave.errors import RunFailed


def disk(path="/dev/sda", serial="S1", **more):
    return {
        "path": path, "serial": serial, "wwn": "", "size_bytes": 10 * 2**30, "model": "M", "removable": False, "virtual": False,
        "read_only": False, "rotational": False, "hctl": "", "by_path": "", "boots": False,
    } | more  # fmt: skip


def test_a_removable_disk_in_first_place_is_never_chosen():
    disks = [disk("/dev/sda", "USB", removable=True), disk("/dev/sdb", "S2")]
    assert choose_root_disk(disks, {})["serial"] == "S2"


def test_a_removable_disk_is_not_chosen_even_when_a_hint_names_it():
    with pytest.raises(RunFailed) as e:
        choose_root_disk([disk(serial="USB", removable=True), disk("/dev/sdb", "S2")], {"serial": "USB"})
    assert e.value.slug == "no-root-disk"


def test_the_recorded_serial_wins_over_todays_boot_entry():
    assert choose_root_disk([disk(boots=True), disk("/dev/sdb", "S2")], {"serial": "S2"})["serial"] == "S2"


def test_todays_boot_entry_decides_between_equals():
    assert choose_root_disk([disk(), disk("/dev/sdb", "S2", boots=True)], {})["serial"] == "S2"


def test_two_equal_disks_are_refused_and_both_named():
    with pytest.raises(RunFailed) as e:
        choose_root_disk([disk(), disk("/dev/sdb", "S2")], {})
    assert e.value.slug == "ambiguous-root-disk"
    assert "S1" in str(e.value) and "S2" in str(e.value)


def test_two_disks_with_one_serial_are_refused_even_when_the_hint_fits():
    with pytest.raises(RunFailed) as e:
        choose_root_disk([disk(), disk("/dev/sdb", "S1")], {"serial": "S1"})
    assert e.value.slug == "ambiguous-root-disk"


def test_two_disks_with_one_serial_are_refused_and_both_named_even_when_their_wwns_differ():
    with pytest.raises(RunFailed) as e:
        choose_root_disk([disk(wwn="w1", boots=True), disk("/dev/sdb", "S1", wwn="w2")], {"wwn": "w1"})
    assert e.value.slug == "ambiguous-root-disk"
    assert "/dev/sda" in str(e.value) and "/dev/sdb" in str(e.value)


def test_a_disk_without_serial_and_wwn_can_not_be_named():
    with pytest.raises(RunFailed):
        choose_root_disk([disk(serial="")], {})


def test_hints_are_read_or_refused_by_name():
    assert parse_hints("serial=A,rotational=false,size=480") == {"serial": "A", "rotational": False, "size": 480}
    for bad in ("serial", "colour=red", "rotational=maybe", "size=big"):
        with pytest.raises(ValueError):
            parse_hints(bad)


flags = st.booleans()
some_disk = st.builds(
    lambda i, removable, virtual, read_only, boots: disk(f"/dev/sd{i}", f"S{i}", removable=removable, virtual=virtual, read_only=read_only, boots=boots),
    st.integers(0, 5), flags, flags, flags, flags,
)  # fmt: skip


@given(st.lists(some_disk, max_size=6))
def test_whatever_is_there_only_a_candidate_is_chosen(disks):
    try:
        chosen = choose_root_disk(disks, {})
    except RunFailed:
        return
    assert is_candidate(chosen)
    assert sum(d["serial"] == chosen["serial"] for d in disks if is_candidate(d)) == 1
