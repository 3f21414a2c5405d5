"""Faults of speculative decoding: what is drafted, which drafts are accepted, and what the rejected ones leave
behind."""

from __future__ import annotations

from planted_faults.fault import Fault

SCHEDULER = "engine/scheduling/scheduler.py"
PLANNER = "engine/scheduling/planner.py"
SPECULATION_FILE = "engine/speculation/speculation.py"
VERIFICATION = "workers/verification.py"
LINK = "engine/coordinator/draft_link.py"
SCHEDULER_TESTS = "tests/engine/scheduling/test_scheduler.py"
SIMULATION = "tests/engine/scheduling/test_simulation.py"
TESTS = "tests/engine/speculation/test_speculation.py"
COST_TESTS = "tests/engine/speculation/test_costs.py"
VERIFICATION_TESTS = "tests/workers/test_verification.py"
INVARIANCE = "tests/invariance/test_speculation.py"
DRAFTING = "workers/drafters/model.py"
DRAFTING_TESTS = "tests/workers/test_drafting.py"
DRAFT_WORKERS_TESTS = "tests/engine/coordinator/test_draft_workers.py"
LINK_TESTS = "tests/engine/coordinator/test_draft_link.py"
WAITS = "tests/engine/coordinator/test_waits.py"

SPECULATION = (
    Fault(
        "rejected-drafts-count-as-written",
        "Positions of rejected drafts count as computed, and the tokens at them never are.",
        SCHEDULER,
        "                num_written -= self._count_rejected(request, planned.draft_token_ids, sampled)",
        "                self._count_rejected(request, planned.draft_token_ids, sampled)",
        (f"{SCHEDULER_TESTS}::test_after_rejected_drafts_the_request_continues_after_its_last_token",),
    ),
    Fault(
        "rejected-drafts-stay-computed",
        "After a rejection the next step begins after the rejected drafts.",
        SCHEDULER,
        "                if holds_blocks:\n                    request.num_computed_tokens = num_written",
        "                pass",
        (
            f"{SCHEDULER_TESTS}::test_after_rejected_drafts_the_request_continues_after_its_last_token",
            f"{SIMULATION}::test_drafts_are_kept_and_rejected_among_preemptions_and_prefix_hits",
        ),
    ),
    Fault(
        "one-rejected-draft-counts-as-written",
        "The first rejected draft counts as the token that was sampled in its place.",
        SCHEDULER,
        "        return len(drafts) - num_kept",
        "        return max(0, len(drafts) - num_kept - 1)",
        (f"{SCHEDULER_TESTS}::test_after_rejected_drafts_the_request_continues_after_its_last_token",),
    ),
    Fault(
        "block-with-a-rejected-draft-is-committed",
        "A block that ends with a rejected draft is found by the tokens that were sampled instead.",
        SCHEDULER,
        "            if holds_blocks and num_written >= request.next_commit_at:\n"
        "                self._kv_cache.commit(request, num_written, sampled.token_ids)",
        "            offered = num_written + (0 < len(sampled.token_ids) <= len(planned.draft_token_ids))\n"
        "            if holds_blocks and offered >= request.next_commit_at:\n"
        "                self._kv_cache.commit(request, offered, sampled.token_ids)",
        (
            f"{SCHEDULER_TESTS}::test_a_block_that_ends_with_a_rejected_draft_is_not_found",
            f"{INVARIANCE}::test_a_block_that_ends_with_a_rejected_draft_is_not_read",
        ),
    ),
    Fault(
        "drafts-beyond-the-last-token",
        "Drafts are verified past the last token that a request may have.",
        PLANNER,
        "        room = min(room, request.compute_limit - request.num_tokens)\n",
        "",
        (f"{SCHEDULER_TESTS}::test_drafts_never_reach_past_the_last_token_a_request_may_have",),
    ),
    Fault(
        "drafts-take-the-place-of-decoding",
        "Drafts of one request fill the step, and the requests after it stop decoding.",
        PLANNER,
        "min(step.budget - num_new - num_later, ",
        "min(step.budget - num_new, ",
        (f"{SCHEDULER_TESTS}::test_drafts_leave_a_token_to_each_request_after_them",),
    ),
    Fault(
        "drafts-of-a-step-without-bound",
        "A step brings more drafts than a worker has rows of logits for.",
        PLANNER,
        "self._limits.max_draft_tokens - step.num_draft_tokens)",
        "self._limits.max_draft_tokens)",
        (f"{SIMULATION}::test_a_busy_workload_ends_right_under_every_setting",),
    ),
    Fault(
        "planned-ahead-of-drafts",
        "While one request's drafts are verified, the others run ahead, and it waits for two steps each time.",
        SCHEDULER,
        "        if self._in_flight and self._waits_for_drafts(now):",
        "        if self._in_flight and not self._requests:",
        (f"{SCHEDULER_TESTS}::test_nothing_is_planned_ahead_of_a_result_that_a_request_needs_to_draft",),
    ),
    Fault(
        "costs-of-drafts-as-expected",
        "Nobody tells how long steps with drafts really took.",
        "engine/speculation/costs.py",
        "self._costs = self._expected.times(load.factor)",
        "pass",
        (f"{COST_TESTS}::test_a_draft_model",),
    ),
    Fault(
        "losses-of-drafts-are-not-counted",
        "Drafts that cost more than they bring never pause.",
        "engine/speculation/costs.py",
        "                if self._lost > load.credit:",
        "                if self._lost > 1000.0:",
        (f"{COST_TESTS}::test_a_draft_model",),
    ),
    Fault(
        "admitted-while-its-drafts-are-verified",
        "A request that was stopped is computed again before it is known how many of its drafts are accepted.",
        "engine/scheduling/request.py",
        "or self.is_held_back or bool(self.drafts_in_flight)",
        "or self.is_held_back",
        (f"{SCHEDULER_TESTS}::test_stopped_while_its_drafts_are_verified_it_waits_for_the_result",),
    ),
    Fault(
        "ranks-of-listed-tokens-lost",
        "With speculation the ranks of tokens that were asked for by id are left out.",
        VERIFICATION,
        '        listed_ranks=b"".join(part.listed_ranks for part in parts),\n',
        "",
        (f"{VERIFICATION_TESTS}::test_the_tokens_up_to_the_first_wrong_draft_are_accepted",),
    ),
    Fault(
        "what-does-not-follow-the-drafts-is-taken",
        "Tokens of a worker that accepted a wrong draft are delivered.",
        "engine/scheduling/planned_step.py",
        "return num_kept <= len(drafts) and token_ids[:num_kept] == drafts[:num_kept]",
        "return num_kept <= len(drafts)",
        (f"{SCHEDULER_TESTS}::test_tokens_that_do_not_follow_the_drafts_are_refused",),
    ),
    Fault(
        "a-draft-takes-the-place-of-the-sampled-token",
        "Drafts are accepted without being compared with what was sampled.",
        VERIFICATION,
        "        kept.append(row)\n        if row.token_id != draft:\n            break",
        "        kept.append(row if draft is None else row._replace(token_id=draft))\n"
        "        if draft is None:\n            break",
        (f"{VERIFICATION_TESTS}::test_the_tokens_up_to_the_first_wrong_draft_are_accepted",),
    ),
    Fault(
        "sampled-token-after-a-rejected-draft-is-kept",
        "One more token is kept than was sampled after right drafts.",
        VERIFICATION,
        "        kept.append(row)\n        if row.token_id != draft:\n            break",
        "        rejected = bool(kept) and kept[-1].token_id != drafts[len(kept) - 1]\n"
        "        kept.append(row)\n        if rejected:\n            break",
        (f"{VERIFICATION_TESTS}::test_the_tokens_up_to_the_first_wrong_draft_are_accepted",),
    ),
    Fault(
        "token-at-a-rejected-draft-is-lost",
        "The token sampled in the place of a rejected draft is thrown away with it.",
        VERIFICATION,
        "        kept.append(row)\n        if row.token_id != draft:\n            break",
        "        if row.token_id != draft and kept:\n            break\n        kept.append(row)\n"
        "        if row.token_id != draft:\n            break",
        (f"{VERIFICATION_TESTS}::test_the_tokens_up_to_the_first_wrong_draft_are_accepted",),
    ),
    Fault(
        "a-draft-stays-in-the-sequence",
        "The first draft stays in the worker's copy of the sequence, whether it is accepted or not.",
        VERIFICATION,
        "            del state.token_ids[length:]",
        "            del state.token_ids[length + 1 :]",
        (f"{VERIFICATION_TESTS}::test_drafts_are_history_only_while_they_are_verified",),
    ),
    Fault(
        "rejected-drafts-stay-counted",
        "Penalties count tokens that were only drafted.",
        "workers/sampling/state.py",
        "        if self._counts is not None:\n            self._counts.retreat_to(position)",
        "        return",
        (
            f"{VERIFICATION_TESTS}::test_drafts_are_history_only_while_they_are_verified",
            "tests/workers/sampling/test_state.py::test_tokens_that_are_replaced_are_not_counted",
        ),
    ),
    Fault(
        "drafts-for-a-shorter-sequence-are-verified",
        "Drafts that were made before the last tokens came are verified after them.",
        SPECULATION_FILE,
        "drafts = self._drafts[:room] if self._num_known == len(token_ids) else []",
        "drafts = self._drafts[:room]",
        (f"{TESTS}::test_drafts_for_another_length_are_not_used",),
    ),
    Fault(
        "drafts-from-outputs-of-another-salt",
        "Drafts, and with them the time a request takes, tell what requests with another salt were given.",
        "engine/speculation/lookup.py",
        "        recent = self._by_salt.pop(salt, None) or",
        "        salt = None\n        recent = self._by_salt.pop(salt, None) or",
        ("tests/engine/speculation/test_lookup.py::test_no_draft_comes_from_an_output_with_another_salt",),
    ),
    Fault(
        "draft-model-keeps-keys-of-wrong-drafts",
        "A draft model goes on from drafts that were rejected.",
        DRAFTING,
        "resumable = min(num_right, len(self.token_ids) - 1)",
        "resumable = len(self.token_ids) - 1",
        (f"{DRAFTING_TESTS}::test_keys_and_values_hold_as_far_as_the_drafts_were_right",),
    ),
    Fault(
        "draft-model-goes-on-from-the-state-after-its-drafts",
        "A draft model whose layers keep states has one slot for the state after known tokens and that after drafts.",
        "workers/cpu/drafter.py",
        "return self.slots.known if num_tokens <= len(self.task.token_ids) else self.slots.drafted",
        "return self.slots.known",
        ("tests/workers/test_drafting_with_states.py::test_sequences_that_stay",),
    ),
    Fault(
        "draft-model-reads-blocks-it-has-lost",
        "A draft model whose blocks were given to another sequence takes them for its own.",
        DRAFTING,
        "        sequence.block_ids = []\n        sequence.num_computed = 0",
        "        sequence.block_ids = []",
        (f"{DRAFTING_TESTS}::test_a_sequence_whose_blocks_were_taken_is_computed_from_its_first_token",),
    ),
    Fault(
        "draft-model-samples-with-other-noise",
        "Drafts and tokens are sampled with different noise, and most drafts are rejected.",
        DRAFTING,
        "replace(new, params=params, adapter=None)",
        "replace(new, params=params, adapter=None, seed=new.seed + 1)",
        (
            f"{DRAFTING_TESTS}::test_the_drafter_samples_by_the_request_s_own_seed_and_parameters",
            "tests/invariance/test_speculative_distribution.py::test_drafts_are_samples_too",
        ),
    ),
    Fault(
        "a-wait-for-a-draft-worker-without-an-end",
        "A request waits forever for a draft worker that has stalled.",
        SPECULATION_FILE,
        "        return self.answer is None and now < self.deadline and not self.worker.is_gone",
        "        return self.answer is None and not self.worker.is_gone",
        (f"{WAITS}::test_every_wait_has_an_end", f"{LINK_TESTS}::test_nobody_waits_longer_than_a_moment"),
    ),
    Fault(
        "a-wait-for-a-draft-worker-that-is-gone",
        "Requests wait until the deadline for a draft worker that has died.",
        LINK,
        "            self._worker.is_gone = True",
        "            pass",
        (f"{LINK_TESTS}::test_a_new_worker_is_told_everything_again",),
    ),
    Fault(
        "the-death-of-a-draft-worker-is-that-of-a-target",
        "Requests are recomputed, and their worker is replaced, because a draft worker has died.",
        "engine/coordinator/core.py",
        "            if self._drafts is None or error.rank not in self._drafts.ranks or self.ready is None:\n"
        "                raise",
        "            raise",
        (f"{DRAFT_WORKERS_TESTS}::test_one_that_never_comes_back_is_given_up",),
    ),
    Fault(
        "an-answer-to-another-step-is-taken",
        "What a draft worker answers to an older step is handed to the requests of the present one.",
        LINK,
        "        if step is None or result.step_id != step.step_id:",
        "        if step is None:",
        (
            f"{WAITS}::test_every_wait_has_an_end",
            f"{DRAFT_WORKERS_TESTS}::test_one_that_answers_wrongly_is_replaced",
        ),
    ),
    Fault(
        "late-drafts-are-used",
        "Drafts that come after the request has gone on are taken as drafts of what comes next.",
        SPECULATION_FILE,
        "        self.ask = None\n        self._drafts, self._num_known = ask.answer or [], ask.num_known",
        "        self._drafts, self._num_known = ask.answer or [], ask.num_known",
        (f"{LINK_TESTS}::test_drafts_that_come_too_late_are_not_used",),
    ),
)
