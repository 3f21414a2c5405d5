"""Settings of all tests: reproducible property tests, without time limits of their own; interrupts as at a terminal."""

from __future__ import annotations

import signal

from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")

# a suite started in the background ignores interrupts, and so would every process that its tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
