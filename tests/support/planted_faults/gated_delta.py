"""Faults of gated delta layers: the rule, the convolution, and which rows of the checkpoint are read for what."""

from __future__ import annotations

from planted_faults.fault import Fault

CPU, GPU = "kernels/gated_delta/cpu.py", "kernels/gated_delta/gpu.py"
CPU_TESTS = "tests/kernels/test_gated_delta.py"
GPU_TESTS = "tests/kernels/interpreter/test_gated_delta.py"
FAMILY = "tests/workers/test_families.py::test_greedy_tokens_are_those_of_transformers_and_bits_their_own"

GATED_DELTA = (
    Fault(
        "state-does-not-decay",
        "A state keeps all that it ever learned.",
        CPU,
        "value = b.fmul(load(b, b.add(self.before, at), vec(F32)), decays)",
        "value = b.fmul(load(b, b.add(self.before, at), vec(F32)), constant(1.0))",
        (f"{CPU_TESTS}::test_values_are_those_of_float64",),
    ),
    Fault(
        "rows-forget-the-rows-of-their-step",
        "Every row of a step starts from the state that the request read.",
        CPU,
        "        before = after\n",
        "",
        (f"{CPU_TESTS}::test_a_step_may_leave_the_state_after_every_row",),
    ),
    Fault(
        "value-heads-take-turns",
        "Value heads are given to key heads in turn instead of group by group.",
        CPU,
        "key_head = v // (num_values // num_keys)",
        "key_head = v % num_keys",
        (f"{CPU_TESTS}::test_values_are_those_of_float64",),
    ),
    Fault(
        "inputs-before-a-short-chunk-are-lost",
        "After a chunk shorter than the convolution, inputs before it count as zeros.",
        CPU,
        "                _copy_row(taps[j], states + writes[t]",
        "                if t - (width - 1) + j >= rows[0]:\n                    _copy_row(taps[j], states + writes[t]",
        (f"{CPU_TESTS}::test_bits_do_not_depend_on_cuts_slots_or_neighbours",),
    ),
    Fault(
        "small-softplus-is-rounded",
        "Decays near 1 are those of the nearest number to 1 + exp.",
        "kernels/sampling/elementary.py",
        "(log32(rounded) + (u - (rounded - _ONE)) / rounded)",
        "log32(rounded)",
        (f"{CPU_TESTS}::test_softplus_has_full_relative_precision",),
    ),
    Fault(
        "convolution-sees-a-row-twice",
        "The row before is taken for the one at hand on a GPU.",
        GPU,
        "x3, x2, x1 = x2, x1, x0",
        "x3, x2, x1 = x2, x1, x1",
        (f"{GPU_TESTS}::test_values_are_those_of_float64",),
    ),
    Fault(
        "error-is-not-weighted",
        "A state learns every value in full on a GPU.",
        GPU,
        "error = (v - tl.sum(state * k[:, None], axis=0)) * beta",
        "error = v - tl.sum(state * k[:, None], axis=0)",
        (f"{GPU_TESTS}::test_values_are_those_of_float64",),
    ),
    Fault(
        "gates-are-queries",
        "Gates of attention are computed by the queries' matrix.",
        "workers/layers/attention.py",
        'self.gate_proj.take("q_proj", rows[:, 1]',
        'self.gate_proj.take("q_proj", rows[:, 0]',
        (f"{FAMILY}[qwen3.5-odd]",),
    ),
    Fault(
        "groups-are-not-taken-apart",
        "Projections that lie side by side for each key head are taken for those of all heads in turn.",
        "workers/layers/gated_delta.py",
        "linear.take(part, torch.cat(kinds), of=linear.out_features)",
        "linear.take(part, rows.reshape(-1), of=linear.out_features)",
        (f"{FAMILY}[qwen3-next]",),
    ),
)
