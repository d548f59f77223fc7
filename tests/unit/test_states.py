"""The state table: every ending of a run is in it, and nothing else is possible."""

import itertools

import pytest

from repave.domain.model import InstanceState, OperationState
from repave.domain.states import TABLE, Ending, NotAllowed, may_reinstall, next_situation


def test_every_event_leads_somewhere():
    assert {event for _, event, _ in TABLE} == set(Ending)


def test_what_is_not_in_the_table_is_refused():
    known = {(s, e) for s, e, _ in TABLE}
    for state, event in itertools.product(InstanceState, Ending):
        if (state, event) not in known:
            with pytest.raises(NotAllowed):
                next_situation(state, event, InstanceState.RUNNING)


def test_a_rehearsal_gives_back_the_state_it_found_and_says_neither_succeeded_nor_failed():
    for found in (InstanceState.RUNNING, InstanceState.ERROR):
        after = next_situation(InstanceState.PENDING, Ending.REHEARSED, found)
        assert (after.state, after.operation) == (found, None)


def test_a_returned_run_gives_back_the_state_it_found():
    for found in (InstanceState.RUNNING, InstanceState.ERROR):
        after = next_situation(InstanceState.PENDING, Ending.RETURNED, found)
        assert after.state is found
        assert after.operation is OperationState.REINSTALL_FAILED


def test_only_a_proof_makes_running_after_the_line():
    ways = {event for (_, event, _), (after, _) in TABLE.items() if after.state is InstanceState.RUNNING}
    assert ways == {Ending.PROVED, Ending.RETURNED, Ending.LATE_PROOF, Ending.REHEARSED}


def test_a_reinstall_is_possible_from_running_and_error_only():
    assert [s for s in InstanceState if may_reinstall(s)] == [InstanceState.RUNNING, InstanceState.ERROR]
