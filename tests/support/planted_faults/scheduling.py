"""Faults of the scheduler: who computes what in a step, and what becomes of its result."""

from __future__ import annotations

from planted_faults.fault import Fault

REQUEST = "engine/scheduling/request.py"
SCHEDULER = "engine/scheduling/scheduler.py"
PLANNER = "engine/scheduling/planner.py"
STEP = "engine/scheduling/planned_step.py"
TESTS = "tests/engine/scheduling/test_scheduler.py"

SCHEDULING = (
    Fault(
        "computes-one-token-too-many",
        "A request computes keys and values for its last possible token, which nobody reads.",
        REQUEST,
        "self.compute_limit = min(self.max_total_tokens - 1, limits.max_kv_tokens)",
        "self.compute_limit = min(self.max_total_tokens, limits.max_kv_tokens)",
        (f"{TESTS}::test_a_step_ahead_plans_the_token_in_flight_and_never_past_max_tokens",),
    ),
    Fault(
        "short-prompts-wait-for-long-ones",
        "A short prompt is computed after all of the long ones that came before it.",
        PLANNER,
        "_SHARE_FOR_SHORT = 4",
        "_SHARE_FOR_SHORT = 1 << 30",
        (f"{TESTS}::test_a_short_prompt_does_not_wait_for_the_long_ones_before_it",),
    ),
    Fault(
        "scored-prompt-tokens-cost-nothing-more",
        "A step of scored prompt tokens takes far longer than others, and everybody waits for it.",
        REQUEST,
        "_SCORED_COST = 2",
        "_SCORED_COST = 1",
        (f"{TESTS}::test_scored_prompt_tokens_take_twice_the_room",),
    ),
    Fault(
        "tokens-far-from-the-beginning-cost-nothing-more",
        "A step deep in a long prompt takes far longer than others, and everybody waits for it.",
        REQUEST,
        "        if parity is None:",
        "        if True:",
        (f"{TESTS}::test_tokens_far_from_the_beginning_take_more_room",),
    ),
    Fault(
        "crumbs-of-a-step-go-to-a-later-prompt",
        "What a long prompt leaves of a step starts another one, which then waits behind the long one.",
        STEP,
        "            self.prompt_budget = 0",
        "            self.prompt_budget = max(0, self.prompt_budget - request.prompt_cost(start, num_tokens))",
        (f"{TESTS}::test_tokens_far_from_the_beginning_take_more_room",),
    ),
    Fault(
        "paused-request-goes-on-after-a-crash",
        "A request whose reader is behind continues when its worker is replaced, and more piles up.",
        PLANNER,
        "WaitingQueue(request for request in requests if not request.is_paused)",
        "WaitingQueue(requests)",
        (f"{TESTS}::test_a_paused_request_can_be_aborted_and_survives_a_crash",),
    ),
    Fault(
        "paused-request-keeps-its-place",
        "A request whose reader is behind holds a place and blocks that others wait for.",
        PLANNER,
        "        self.leave(request)\n        request.is_paused = True",
        "        request.is_paused = True",
        (f"{TESTS}::test_a_paused_request_leaves_its_place_and_its_blocks_to_others_until_it_goes_on",),
    ),
    Fault(
        "preempted-request-waits-at-the-end",
        "A preempted request loses its place to those that came after it.",
        PLANNER,
        '        """Move a request from running back to waiting, at its place in the order."""\n'
        "        self.leave(request)\n        self.wait(request)",
        "        self.leave(request)\n"
        "        request.order_key = (request.order_key[0], 1 << 60, request.request_id)\n        self.wait(request)",
        (f"{TESTS}::test_a_preempted_request_goes_on_before_those_that_came_after_it",),
    ),
    Fault(
        "preempted-request-keeps-its-blocks",
        "Blocks of a preempted request stay taken, and those who run never get them.",
        PLANNER,
        '        """Move a request from running back to waiting, at its place in the order."""\n'
        "        self.leave(request)\n        self.wait(request)",
        "        self.running.remove(request)\n        request.is_running = False\n        self.wait(request)",
        (f"{TESTS}::test_a_preempted_request_finds_its_own_blocks_again",),
    ),
    Fault(
        "result-of-an-earlier-admission-is-committed",
        "A result from before a preemption makes blocks findable that the new admission has not written.",
        SCHEDULER,
        "holds_blocks = request.is_running and request.admitted_at_step <= in_flight.step_id",
        "holds_blocks = request.is_running",
        (f"{TESTS}::test_a_result_from_before_a_preemption_offers_no_block_of_the_new_admission",),
    ),
    Fault(
        "tokens-are-counted-twice",
        "A token that was counted when its step was planned is counted again when it comes.",
        SCHEDULER,
        "request.num_tokens += len(token_ids) - 1  #",
        "request.num_tokens += len(token_ids)  #",
        (f"{TESTS}::test_running_requests_go_on_decoding_beside_a_long_prompt",),
    ),
    Fault(
        "tokens-after-a-stop-are-delivered",
        "Of several tokens in one result, one after the end of the request reaches the user.",
        SCHEDULER,
        "token_ids, logprobs = token_ids[:count], first",
        "token_ids, logprobs = token_ids[: count + 1], first",
        (f"{TESTS}::test_several_tokens_are_cut_at_the_first_end",),
    ),
    Fault(
        "ended-request-gets-the-step-in-flight",
        "A request that has ended gets the token of a step that was on its way.",
        SCHEDULER,
        "            if request.finish_reason is not None:\n                continue  # aborted",
        '            if request.finish_reason == "never":\n                continue  # aborted',
        (f"{TESTS}::test_a_step_ahead_of_an_end_is_ignored",),
    ),
    Fault(
        "stop-token-one-late",
        "A stop token at the least length that is asked for does not end the request.",
        REQUEST,
        "(num_tokens >= self.min_total_tokens or",
        "(num_tokens > self.min_total_tokens or",
        (f"{TESTS}::test_how_a_request_ends",),
    ),
    Fault(
        "lost-worker-leaves-tokens-in-flight",
        "After a crash a request waits for tokens that were lost with the worker.",
        REQUEST,
        "        self.num_tokens = len(self.token_ids)\n        self.drafts_in_flight = []\n        self.is_known",
        "        self.drafts_in_flight = []\n        self.is_known",
        (f"{TESTS}::test_restart_sends_every_token_again_and_counts_nothing_twice",),
    ),
    Fault(
        "prompt-logprobs-sent-again-after-a-crash",
        "Rows of prompt log-probabilities that were delivered before a crash come twice.",
        REQUEST,
        "        self.prompt_logprobs_start = first + self.num_prompt_logprobs_delivered",
        "        self.prompt_logprobs_start = first",
        (f"{TESTS}::test_prompt_rows_are_asked_for_once_also_after_a_crash",),
    ),
    Fault(
        "prompt-logprobs-row-skipped",
        "The first row of prompt log-probabilities of each chunk is not expected of the worker.",
        STEP,
        "    return max(planned.num_computed_tokens + 1, planned.prompt_logprobs_start)",
        "    return max(planned.num_computed_tokens + 2, planned.prompt_logprobs_start)",
        (f"{TESTS}::test_prompt_rows_are_asked_for_once_also_after_preemption",),
    ),
    Fault(
        "ranks-of-listed-tokens-not-cut",
        "Ranks of tokens that were asked for by id are those of tokens after the end.",
        STEP,
        "        listed_ranks=rows.listed_ranks[: len(rows.listed_ranks) // rows.num_rows * count],\n",
        "",
        (f"{TESTS}::test_several_tokens_are_cut_at_the_first_end",),
    ),
    Fault(
        "suspect-that-has-ended-runs-alone",
        "After a crash everybody waits for a request that has ended to run alone.",
        SCHEDULER,
        "        self._isolation.release(request)\n        del self._requests",
        "        del self._requests",
        (f"{TESTS}::test_nobody_waits_for_a_suspect_that_has_ended",),
    ),
    Fault(
        "prompt-takes-the-place-of-decoding",
        "A long prompt takes the whole step, and requests after it stop decoding.",
        PLANNER,
        "max(1, step.budget - num_later))",
        "max(1, step.budget))",
        (f"{TESTS}::test_a_long_prompt_leaves_a_token_to_each_request_after_it",),
    ),
    Fault(
        "admitted-in-a-step-that-preempts",
        "A waiting request takes the blocks for which another has just been preempted.",
        PLANNER,
        "            if is_roomy:\n                self._plan_waiting(step)",
        "            self._plan_waiting(step)",
        (f"{TESTS}::test_nobody_is_admitted_in_a_step_that_preempts",),
    ),
    Fault(
        "grammar-does-not-wait-for-its-token",
        "A request with a grammar is planned before the token that decides its next mask is known.",
        REQUEST,
        "return self.waits_for_tokens and self.num_tokens > len(self.token_ids)",
        "return False",
        (f"{TESTS}::test_a_request_with_a_grammar_sits_out_while_its_token_is_in_flight",),
    ),
    Fault(
        "crash-forgets-who-was-at-work",
        "Requests that were at work in a crash go on side by side, so that one that kills its worker takes all along.",
        "engine/scheduling/crash_isolation.py",
        "suspect.passes_at = len(request.token_ids) + num_steps[request.request_id]",
        "suspect.passes_at = len(request.token_ids) + 1",
        (f"{TESTS}::test_a_suspect_passes_with_all_tokens_that_were_under_way",),
    ),
)
