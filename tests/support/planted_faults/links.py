"""Faults of the links between processes."""

from __future__ import annotations

from planted_faults.fault import Fault

CODEC = "ipc/codec.py"
LINK = "ipc/channel.py"
COORDINATOR = "engine/coordinator/process.py"
TESTS = "tests/ipc/test_codec.py"
CHANNEL_TESTS = "tests/ipc/test_channel.py"

LINKS = (
    Fault(
        "checksum-not-compared",
        "A flipped bit in a token id is delivered.",
        CODEC,
        "        if found != checksum:",
        "        if found != checksum and not found:",
        (f"{TESTS}::test_a_flipped_bit_is_refused",),
    ),
    Fault(
        "frame-of-another-format-accepted",
        "A frame of another version of the format is decoded as one of this.",
        CODEC,
        "        if magic != MAGIC:",
        "        if magic[:3] != MAGIC[:3]:",
        (f"{TESTS}::test_a_frame_of_another_format_is_refused",),
    ),
    Fault(
        "gap-in-the-count-accepted",
        "A frame that never arrived is waited for without end.",
        LINK,
        "        if sequence > expected:\n",
        "        if sequence > expected + 1:\n",
        (f"{TESTS}::test_a_link_notices_a_lost_frame_and_goes_on",),
    ),
    Fault(
        "repetition-delivered",
        "A frame that comes twice is obeyed twice.",
        LINK,
        "        if sequence < expected:\n            return None",
        "        if sequence < expected:\n            return message",
        (f"{TESTS}::test_a_link_drops_repetitions",),
    ),
    Fault(
        "refused-frame-does-not-count",
        "After one frame that was refused, the next one is taken for the sign of a lost one.",
        LINK,
        "            self.received += 1\n",
        "",
        (f"{TESTS}::test_a_corrupt_frame_counts_as_one",),
    ),
    Fault(
        "refused-message-takes-a-number",
        "A message that is too large to be sent leaves a gap, and the link breaks at the next one.",
        LINK,
        "        frame = self._encoder.encode(message, self._sent + 1)\n        self._sent += 1",
        "        self._sent += 1\n        frame = self._encoder.encode(message, self._sent)",
        (f"{CHANNEL_TESTS}::test_a_large_message_is_refused_before_it_is_sent",),
    ),
    Fault(
        "outputs-pile-up",
        "The outputs for a client that is stopped pile up without end.",
        COORDINATOR,
        "> MOST_UNREAD_BYTES",
        "> 1 << 60",
        ("tests/engine/processes/test_stopped_client.py::test_its_outputs_wait_in_bounded_memory_and_it_goes_on",),
    ),
    Fault(
        "large-frames-pass",
        "Frames beyond the limit of memory are decoded.",
        CODEC,
        "    if size_bytes > limit_bytes:",
        "    if size_bytes > 2 * limit_bytes:",
        (f"{TESTS}::test_size_is_limited_on_both_sides",),
    ),
    Fault(
        "depth-not-checked",
        "A value that is nested too deeply brings down whoever walks it.",
        CODEC,
        '            raise TypeError(f"{type(message).__name__}.{name}: expected at most {MAX_DEPTH}',
        '            return TypeError(f"{type(message).__name__}.{name}: expected at most {MAX_DEPTH}',
        ("tests/ipc/test_frame_fuzz.py::test_depth_is_bounded_on_both_sides",),
    ),
    Fault(
        "stranger-is-obeyed",
        "An error of a peer that was never accepted is taken for one of a link.",
        "ipc/channel.py",
        "                if link:\n                    return identity, error",
        "                return identity, error",
        (f"{CHANNEL_TESTS}::test_a_stranger_is_refused_and_harms_nobody",),
    ),
    Fault(
        "refusals-answered-without-end",
        "Two ends that refuse each other's refusals never fall silent.",
        "ipc/channel.py",
        "        return self.count <= _MOST_REFUSALS",
        "        return True",
        (f"{CHANNEL_TESTS}::test_two_ends_that_refuse_each_other_fall_silent",),
    ),
)
