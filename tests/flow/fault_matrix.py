"""docs/faults.md: what goes wrong, what happens then, and the test that shows it. Made from this table and from the cells of fault_cells.py.

`python tests/flow/fault_matrix.py` writes the page; `--check` fails when it is old, or when a test that it names is not there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

from fault_cells import AGENT, BMC, CUT, IDENTITY, LATER, LATER_CHUNK, MEDIA, list_cells

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs/faults.md"


class Row(NamedTuple):
    """One fault. `star`: of the 25 that matter most. `tests`: file and name, or a cell of fault_cells.py."""

    number: int
    star: bool
    fault: str
    happens: str
    tests: tuple[str, ...]


# fmt: off
SERVICE: tuple[Row, ...] = (
    Row(1, True, "The service dies while it takes a request",
        "What was answered with 202 exists, once, and goes on; what was not answered was taken whole or not at all.", (
        "flow/test_kills.py::test_a_service_killed_right_after_the_202_keeps_what_it_promised",
        "simulation/test_simulation.py::test_a_death_at_every_point_of_every_ending_changes_no_end",
    )),
    Row(2, True, "Two requests for the same instances at once",
        "One is taken whole, the other refused whole, naming the instances.", (
        "flow/test_store_databases.py::test_of_two_requests_that_overlap_at_once_one_wins_whole",
    )),
    Row(4, False, "More requests than the limit",
        "429 with a time after which it works again.", (
        "flow/test_lab_file.py::test_more_requests_than_the_rate_limit_says_are_429_with_a_time_after_which_it_works_again",
    )),
    Row(5, True, "The service dies at any step",
        "It goes on where it was. Each step may be done twice; after the line nothing goes back.", (
        "flow/test_reinstall_workflow.py::test_killed_after_each_step_it_goes_on_to_the_same_end",
        "flow/test_reinstall_workflow.py::test_each_step_run_twice_changes_nothing",
        "flow/test_kills.py::test_a_service_killed_at_five_random_moments_of_a_batch_ends_every_run_once",
    )),
    Row(6, True, "The service is replaced while runs are under way",
        "Runs go on with the new process, or are ended with a cause past their deadline, without their workflow.", (
        "flow/test_workers.py::test_a_worker_that_ends_in_order_leaves_its_runs_to_the_other_at_once",
        "flow/test_cancel_and_waves.py::test_a_run_past_its_deadline_is_ended_without_its_workflow_and_its_later_steps_touch_nothing",
    )),
    Row(8, True, "A second service on the database; one that was paused comes back",
        "On SQLite the second is refused. On PostgreSQL a worker past its lease does nothing more and ends itself.", (
        "flow/test_faults.py::test_a_second_service_on_a_site_is_refused",
        "flow/test_workers.py::test_a_worker_that_was_stopped_past_its_lease_ends_itself_without_a_further_effect",
    )),
    Row(10, True, "The database is away for minutes",
        "No 202. Agents finish what they write; runs go on when it is back, none is lost.", (
        "flow/test_workers.py::test_a_database_that_is_away_longer_than_the_lease_costs_no_worker_and_no_run",
        "flow/test_workers.py::test_a_postgresql_that_is_stopped_under_its_workers_gives_no_202_and_all_goes_on_when_it_is_back",
        "flow/test_database_trouble.py::test_a_lock_that_is_never_given_back_gives_no_202_and_an_alarm",
    )),
    Row(11, True, "The database's disk is full or read-only",
        "No 202, an alarm. A write under way goes on; a run whose workflow died of it goes on when it can be written again.", (
        "flow/test_database_trouble.py::test_a_full_disk_gives_no_202_leaves_nothing_and_is_an_alarm",
        "flow/test_database_trouble.py::test_a_write_under_way_goes_on_while_the_disk_is_full_and_the_run_ends_well",
        "flow/test_database_trouble.py::test_a_database_that_becomes_read_only_gives_no_202_a_write_under_way_is_finished_and_it_goes_on_by_itself",
    )),
    Row(12, False, "The database is busy",
        "The request waits, and nothing is lost.", (
        "flow/test_database_trouble.py::test_a_writer_that_holds_the_lock_for_a_while_delays_a_202_and_nothing_is_lost",
    )),
    Row(13, True, "The database is damaged, or an old one was put back",
        "It is refused at start, with what to run. Met or found while the service runs: no 202, an alarm, nothing more is written into it; a disk being "
        "written is finished. An old state never powers or wipes anything.", (
        "flow/test_database_trouble.py::test_a_read_only_or_damaged_database_is_refused_at_start_with_what_to_run",
        "flow/test_database_trouble.py::test_a_database_that_is_damaged_while_the_service_runs_is_said_to_be_corrupt_and_takes_no_more",
        "unit/test_generation.py::test_a_damaged_page_that_nobody_reads_is_found_by_the_watch_and_nothing_is_written_any_more",
        "flow/test_backup.py::test_an_old_state_that_is_put_back_never_powers_or_wipes_anything",
    )),
    Row(39, False, "The disk fills up during an import",
        "Nothing half is listed, and the room is given back.", (
        "contract/test_operator_images.py::test_a_disk_that_fills_up_during_an_upload_leaves_nothing_and_gives_its_room_back",
    )),
    Row(48, True, "A clock is wrong or is set",
        "No deadline of a run moves, on SQLite; PostgreSQL's workers follow their hosts' clocks. "
        "A server whose clock is years behind is reinstalled all the same. Signed requests stay within 15 minutes.", (
        "unit/test_steady_clock.py::test_a_clock_that_is_set_by_a_day_moves_no_deadline_until_nothing_is_under_way",
        "simulation/test_run_port.py",
        "flow/test_agent_loop.py::test_a_clock_that_is_years_behind_does_not_keep_a_server_from_its_run",
        "unit/test_aksk.py::test_a_clock_may_be_15_minutes_off",
    )),
)
BMCS: tuple[Row, ...] = (
    Row(9, False, "Tries multiply",
        'A power action or an insert is sent once, then the state is read; only an answer that says "busy" is followed by another. '
        "Media that are not in, an override that is not kept, a power that is not on: asked for again 10 seconds later, four times in all.", (
        "contract/test_bmc_faults.py::test_a_lost_answer_is_judged_by_the_state_and_nothing_is_sent_twice",
        "contract/test_bmc_faults.py::test_a_busy_bmc_is_asked_again_only_after_it_said_so",
    )),
    Row(15, True, "A BMC takes the connection and stays silent",
        "Its run ends with that cause, the server untouched; the other runs of the batch go on.", (
        "flow/fault_cells.py::black-hole always at any-request",
        "flow/fault_scenes.py::test_a_silent_bmc_takes_no_time_from_the_other_runs",
        "flow/test_faults.py::test_while_one_bmc_is_silent_the_others_of_its_batch_are_proved",
    )),
    Row(17, True, "A BMC lies: the override is ignored, the insert inserts nothing, power does not change",
        "Everything is read back, so it is found; the old OS runs again, its disk untouched.", (
        "flow/fault_cells.py::ignored always at insert-media",
        "flow/fault_cells.py::ignored always at override",
        "flow/fault_cells.py::ignored once at power-on",
        "contract/test_bmc_faults.py::test_a_bmc_that_says_yes_and_does_nothing_is_found_out",
    )),
    Row(18, True, "The answer of a BMC is lost after it did what was asked",
        "The state is read, and nothing is sent again.", (
        "contract/test_bmc_faults.py::test_a_lost_answer_is_judged_by_the_state_and_nothing_is_sent_twice",
        "flow/fault_cells.py::lost-answer once at power-on-new-os",
        "flow/test_faults.py::test_every_faulty_request_to_a_bmc_ends_in_time_and_is_never_a_false_success",
    )),
    Row(19, False, "A BMC refuses a login",
        "It is sent once, and three times at most: no account is locked.", (
        "contract/test_bmc_faults.py::test_a_bad_login_is_sent_once_and_three_times_at_most",
    )),
    Row(22, True, "Another machine behind a BMC's address, with the same password",
        "Told by its UUID or serial number at each look, and nothing is changed there, also in the middle of a run; the server is locked until an operator has "
        "looked.", (
        "flow/fault_cells.py::elsewhere always at any-request",
        "flow/test_reinstall_workflow.py::test_another_server_behind_the_address_is_locked_until_an_operator_has_looked",
        "flow/test_faults.py::test_another_machine_behind_a_bmcs_address_is_left_alone_and_the_server_locked_until_an_operator_has_looked",
        "flow/test_faults.py::test_a_bmcs_address_that_changes_hands_while_the_image_is_written_powers_no_other_machine",
        "contract/test_bmc_faults.py::test_each_call_looks_who_answers_before_it_changes_anything",
    )),
    Row(24, False, "Boot media come slowly, broken or not at all",
        "Slow is waited for. Without whole media no agent speaks, and the old OS runs again.", (
        "flow/fault_cells.py::slow once at media",
        "flow/fault_cells.py::truncated always at media",
        "flow/fault_cells.py::black-hole always at media",
    )),
    Row(25, True, "The media stay in after the end",
        "They are spent: they boot the local disk. A look every few minutes takes them out when the BMC answers.", (
        "flow/test_leftovers.py::test_media_that_a_bmc_kept_are_taken_out_when_it_is_back_and_an_operators_iso_or_a_locked_server_is_left_alone",
        "flow/test_scripted_machines.py::test_media_without_a_live_run_boot_the_local_disk",
        "rack/test_ramdisk_boots.py::test_an_inert_disc_boots_the_local_disk",
    )),
    Row(26, False, "The eject fails",
        "It is asked again, a minute apart; the written disk stays as it is.", (
        "flow/test_reinstall_workflow.py::test_a_bmc_that_fails_after_the_write_does_not_make_the_disk_unverified",
    )),
)
MACHINES: tuple[Row, ...] = (
    Row(27, True, "The network of a server is cut while its disk is written",
        "The agent stops when its lease ends, the disk can not boot, the run ends in error; a short cut only delays it.", (
        "flow/fault_cells.py::black-hole always at network",
        "flow/test_agent_loop.py::test_an_agent_whose_lease_ran_out_stops_and_its_disk_cannot_boot",
    )),
    Row(28, False, "Reports are lost, come twice or late",
        "The first counts; what comes after the end is ignored.", (
        "flow/fault_cells.py::twice once at report",
        "flow/test_reinstall_workflow.py::test_a_stop_that_began_is_not_overtaken_by_a_late_report",
    )),
    Row(29, False, "The ramdisk is never heard",
        "The old OS runs again, its disk untouched.", (
        "flow/test_batches.py::test_a_machine_that_never_says_hello_runs_its_old_os_again_and_its_disk_is_untouched",
    )),
    Row(31, False, "The call home is lost",
        "The new OS calls again. Heard too late it still counts, until another run begins.", (
        "flow/fault_cells.py::status always at call-home",
        "flow/test_batches.py::test_a_new_os_that_never_calls_home_is_an_error_and_its_late_proof_ends_it",
    )),
    Row(33, True, "The agent dies while it writes",
        "Started again in the same boot, it keeps what is verifiably on the disk; meanwhile that can not boot. One that stays away ends the run in error.", (
        "flow/test_agent_killed.py::test_an_agent_killed_before_the_line_and_again_while_it_writes_is_started_again_and_the_run_ends_running",
        "unit/test_agent_writer.py::test_killed_at_any_stage_the_disk_can_not_boot_and_the_next_write_repairs_it",
        "flow/test_reinstall_workflow.py::test_an_agent_that_falls_silent_after_the_line_ends_in_error_powered_off",
    )),
    Row(35, True, "Two agents show the token of one run",
        "The second boot is refused and told nothing; before the line the run goes back, and an event says who it was.", (
        "flow/test_faults.py::test_a_second_boot_with_a_runs_token_is_refused_and_before_the_line_the_run_goes_back",
    )),
    Row(37, True, "A chunk is missing, rotten or cut off",
        "It is found before it is written, and fetched again; if it stays wrong, the run ends, its disk can not boot, no other run crosses.", (
        "flow/test_reinstall_workflow.py::test_an_image_that_another_run_met_damaged_is_looked_at_again_before_the_line_until_it_is_whole",
        "unit/test_agent_writer.py::test_a_chunk_that_stays_wrong_ends_the_run_before_anything_of_it_is_written",
        "flow/fault_cells.py::stale always at later-chunk",
        "flow/test_batches.py::test_a_chunk_damaged_after_preflight_is_never_written_and_the_half_written_disk_can_not_boot",
    )),
    Row(41, True, "Power is lost at any write to the disk",
        "The firmware never boots it before the last sector is there; the next reinstall works.", (
        "power_loss/test_power_loss.py::test_power_lost_under_the_agent_in_its_ramdisk_never_boots_and_ovmf_agrees",
    )),
    Row(42, True, "The disk reports errors",
        "The run ends in error and says so; never success.", (
        "unit/test_agent_writer.py::test_a_disk_that_reports_an_error_ends_the_run",
    )),
    Row(43, True, "The disk loses a write that it acknowledged",
        "It is found when the disk is read back, before it can boot.", (
        "unit/test_agent_writer.py::test_a_disk_that_loses_a_write_is_found_before_it_can_boot",
    )),
    Row(44, False, "The disk is too small or has other sectors",
        "Refused before any power action where it is known, else before the line.", (
        "flow/test_refusals.py::test_an_image_larger_than_the_disk_is_refused_before_any_power_action",
        "flow/test_refusals.py::test_other_sectors_that_only_the_ramdisk_sees_are_refused_before_the_line_and_the_old_os_runs_again",
    )),
    Row(45, True, "The disk is gone, renamed or another one",
        "The plan names it by serial; the agent looks again and writes nothing else.", (
        "flow/test_agent_loop.py::test_a_plan_for_another_disk_writes_nothing_and_is_reported",
    )),
    Row(46, False, "Two disks with one serial",
        "Refused, both named.", (
        "unit/test_root_disk.py::test_two_disks_with_one_serial_are_refused_even_when_the_hint_fits",
    )),
    Row(49, True, "The rack and the service lose power at one moment",
        "Every run ends, none is lost: disks not yet written boot the old OS, half-written ones do not boot, and each can be reinstalled.", (
        "flow/fault_scenes.py::test_a_rack_and_its_service_that_lose_power_at_one_moment_end_every_run",
        "flow/test_faults.py::test_two_servers_and_the_service_that_lose_power_at_one_moment_end_both_runs",
    )),
    Row(51, True, "The old OS comes up instead of the ramdisk or the new OS",
        "It is not taken for the new one: only a proof of this run counts.", (
        "flow/fault_scenes.py::test_an_old_os_that_comes_up_instead_of_the_ramdisk_is_never_a_success",
        "flow/test_reinstall_workflow.py::test_no_proof_is_error_with_the_server_left_on",
    )),
    Row(52, True, "Another disk boots",
        "Its serial in the proof is not the plan's: error, power off.", (
        "flow/test_reinstall_workflow.py::test_a_proof_from_another_disk_is_never_running",
    )),
)
# fmt: on
PARTS = (("The service and its database", SERVICE), ("BMCs and boot media", BMCS), ("Servers, disks and their network", MACHINES))
ENDINGS = {
    "running": "the new OS proved itself; its disk is the image",
    "returned": "before the line: the disk's bytes are what they were, the old OS runs again",
    "return-failed": "before the line: the disk's bytes are what they were, `error`, because the BMC can not be made to give the old OS back",
    "stopped": "after the line: `error`, off, the half-written disk can not boot",
    "stopped-whole": "after the line: `error`, off; the image is whole, but nobody heard it",
    "stopped-clean": "`error`, off: counted as crossed, though nothing was written",
    "unproved": "`error`, on: the image is whole; the proof, once it is heard, makes it `running`",
}
FAULTS = {
    "latency": "answered late", "black-hole": "never answered", "reset": "connection reset", "status": "answered 503", "truncated": "half an answer",
    "twice": "arrives twice", "lost-answer": "done, answer lost", "stale": "another run's answer", "slow": "slow answer", "ignored": "answered well, not done",
    "elsewhere": "another machine answers",
}  # fmt: skip


def render() -> str:
    parts = [
        "# What goes wrong, and what happens then\n",
        "<!-- Made by `make docs` from tests/flow/fault_matrix.py and fault_cells.py; do not edit. -->\n",
        "*The line* is where the root disk begins to be written. `make faults` runs every cell below and those of the BMC driver; a slice is in `make test`.",
        "★: the 25 that matter most.",
    ]
    for title, rows in PARTS:
        parts.append(f"\n## {title}\n\n| | Fault | What happens | Tested by |\n|---|---|---|---|")
        for row in rows:
            tests = "<br>".join(f"`{name}`" for name in row.tests)
            parts.append(f"| {row.number}{'★' if row.star else ''} | {row.fault} | {row.happens} | {tests} |")
    parts.append("\n## One request of a reinstall fails\n\nOnce, then all is well again; or always, from that request on. How the reinstall ends:\n")
    parts += [f"- *{name}*: {text}" for name, text in ENDINGS.items()]
    cells = list_cells()
    for title, always in (("Once", False), ("Always, from that request on", True)):
        shown = [c for c in cells if c.always is always]
        faults = [f for f in FAULTS if any(c.fault == f for c in shown)]
        parts.append(f"\n| {title} | {' | '.join(FAULTS[f] for f in faults)} |\n|---|{'---|' * len(faults)}")
        for call in (*AGENT, LATER_CHUNK, CUT, MEDIA, *BMC, IDENTITY, LATER):
            ends = {c.fault: c.ends for c in shown if c.call == call}
            if ends:
                parts.append(f"| {call.name} | {' | '.join(ends.get(f, '') for f in faults)} |")
    return "\n".join(parts) + "\n"


def find_missing() -> list[str]:
    """The named tests and cells that are not there, and stars that are not 25."""
    cells = {str(cell) for cell in list_cells()}
    missing = []
    for _, rows in PARTS:
        for name in (name for row in rows for name in row.tests):
            path, _, test = name.partition("::")
            there = test in cells if path.endswith("fault_cells.py") else re.search(rf"def {test}\b", (TESTS / path).read_text()) is not None
            missing += [] if there else [f"{name} is not there"]
    stars = sum(row.star for _, rows in PARTS for row in rows)
    return missing + ([] if stars == 25 else [f"{stars} rows have a star"])


def main() -> int:
    wrong = find_missing()
    if "--check" not in sys.argv:
        PAGE.write_text(render())
    elif not PAGE.is_file() or PAGE.read_text() != render():
        wrong.append("docs/faults.md is not up to date: make docs")
    print("\n".join(wrong) or "docs/faults.md is up to date")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
