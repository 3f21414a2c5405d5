"""Faults of states: which slot a request reads and writes, and which snapshots others may resume from."""

from __future__ import annotations

from planted_faults.fault import Fault

SLOTS = "engine/scheduling/state_slots.py"
CACHE = "engine/scheduling/kv_cache_manager.py"
TESTS = "tests/engine/scheduling/test_state_slots.py"
SIMULATION = "tests/engine/scheduling/test_simulation.py"
BUSY = f"{SIMULATION}::test_a_busy_workload_ends_right_under_every_setting"
CRASHES = f"{SIMULATION}::test_every_end_and_every_crash_of_few_requests_leaves_all_slots_free"

STATES = (
    Fault(
        "cached-prefix-without-a-state",
        "A request goes on after cached keys and values from the state of another length.",
        CACHE,
        "            del blocks[self.states.num_resumable_blocks(request.block_keys[: len(blocks)]) :]\n",
        "",
        (BUSY,),
    ),
    Fault(
        "snapshot-is-overwritten-while-it-is-read",
        "A step reads a snapshot into whose slot another request of the same step writes.",
        SLOTS,
        "                self._read_now.append(held.snapshot)",
        "                self._pool.release([held.snapshot])",
        (f"{TESTS}::test_a_snapshot_that_a_step_reads_is_not_overwritten_by_the_same_step",),
    ),
    Fault(
        "snapshot-in-flight-is-findable",
        "The snapshot of a later chunk can be found when an earlier one's result is back, though its step may fail.",
        SLOTS,
        "while held.new_snapshots and held.new_snapshots[0][0] <= num_written:",
        "while held.new_snapshots and held.new_snapshots[0][0] <= request.num_computed_tokens:",
        (f"{TESTS}::test_the_result_of_one_chunk_says_nothing_of_the_next_ones_snapshot",),
    ),
    Fault(
        "snapshot-under-the-key-of-another-block",
        "A snapshot is found by the key of the block before its own.",
        SLOTS,
        "            key = request.block_keys[length // self._block_size - 1]\n            self._snapshots",
        "            key = request.block_keys[max(0, length // self._block_size - 2)]\n            self._snapshots",
        (BUSY,),
    ),
    Fault(
        "state-of-rejected-drafts-goes-on",
        "After drafts are rejected the request goes on from the state after the last of them.",
        SLOTS,
        "kept = dict(undecided).get(num_written)",
        "kept = undecided[-1][1] if num_written in dict(undecided) else None",
        (BUSY,),
    ),
    Fault(
        "token-is-folded-in-twice",
        "A token that is computed again goes into the state a second time.",
        "engine/scheduling/scheduler.py",
        "elif holds_blocks and request.slots is not None and not request.slots.undecided:",
        "elif request is None:",
        (BUSY,),
    ),
    Fault(
        "drafts-take-the-slots-of-requests",
        "Snapshots and drafts leave no slots for requests that may still come.",
        SLOTS,
        "return max(0, self._pool.num_available - (self._max_num_seqs - self._num_holders))",
        "return self._pool.num_available",
        (f"{TESTS}::test_slots_of_requests_come_before_everything_else",),
    ),
    Fault(
        "snapshots-outlive-the-worker",
        "After a crash snapshots are found whose contents died with the worker.",
        CACHE,
        "            self.states.forget_snapshots()",
        "            pass",
        (CRASHES,),
    ),
    Fault(
        "rejected-drafts-keep-their-slots",
        "The slots of drafts that were not accepted are never free again.",
        SLOTS,
        "        held.own = kept\n        self._pool.release(rest)",
        "        held.own = kept",
        (f"{TESTS}::test_of_drafts_the_accepted_one_leaves_its_state_and_the_others_nothing",),
    ),
    Fault(
        "states-are-written-after-rows-of-others",
        "A request's states are kept after the rows of the step's first request.",
        "workers/input_batch.py",
        "writes[first + offset] = slot",
        "writes[offset] = slot",
        ("tests/workers/test_input_batch.py::test_states_are_read_by_requests_and_written_by_rows",),
    ),
    Fault(
        "unwritten-state-is-read",
        "A worker computes a request from whatever its slot holds.",
        "workers/slot_validation.py",
        "if item.state_read >= 0 and not self._is_written[item.state_read]:",
        "if item.state_read >= self._num_slots:",
        ("tests/workers/test_slot_validation.py::test_a_slot_that_was_never_written_is_not_read",),
    ),
    Fault(
        "padding-writes-a-state",
        "Padding of a step overwrites the first slot.",
        "workers/steps.py",
        'state_writes=Field(np.int32, ("T",), -1, of_states=True)',
        'state_writes=Field(np.int32, ("T",), 0, of_states=True)',
        (
            "tests/workers/test_steps.py"
            "::test_a_model_without_states_sends_none_and_one_with_states_pads_them_with_none",
        ),
    ),
)
