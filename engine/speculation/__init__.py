"""Guesses of the tokens to come, and how many of them are worth their verification. No torch, no randomness, no clock.

    lookup.py     Drafter: what guesses from a sequence's own tokens; NgramDrafter, SuffixDrafter, TokenIndex
    speculation.py  Speculation: one request's side of it, as the scheduler asks for it; SpeculationPlan makes them;
                    DraftLength: how many tokens to guess, from how the last guesses went and what they cost

A guess never reaches an output: the worker samples its own token at every position and keeps guesses only as far as
they equal its tokens. So everything here is about speed.
"""

from sempre.engine.speculation.speculation import ModelSpeculation, Speculation, SpeculationPlan

__all__ = ["ModelSpeculation", "Speculation", "SpeculationPlan"]
