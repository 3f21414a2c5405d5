"""Drafts of the next tokens, and how many are worth verifying. No torch, no randomness, no clock of its own.

    lookup.py     Drafter: drafts from a sequence's own tokens; NgramDrafter, SuffixDrafter, TokenIndex
    costs.py      DraftMeter: what drafts cost, and how many are right; DraftLength: how many tokens to draft
    speculation.py  Speculation: one request's drafts for the scheduler; SpeculationPlan creates them;
                    Ask: a request to a draft worker, with a deadline

A draft token never reaches an output: the worker samples its own token at every position and accepts drafts only while
they equal its tokens. So everything here only affects speed.
"""

from sempre.engine.speculation.speculation import Ask, Incarnation, ModelSpeculation, Speculation, SpeculationPlan

__all__ = ["Ask", "Incarnation", "ModelSpeculation", "Speculation", "SpeculationPlan"]
