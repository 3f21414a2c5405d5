"""Drafts of the tokens to come, and how many of them are worth their verification. No torch, no randomness, no clock.

    lookup.py     Drafter: what drafts from a sequence's own tokens; NgramDrafter, SuffixDrafter, TokenIndex
    speculation.py  Speculation: one request's side of it, as the scheduler asks for it; SpeculationPlan makes them;
                    DraftLength: how many tokens to draft, from how many were accepted lately and what they cost;
                    Ask: what a draft worker was asked, and until when a request waits for it

A draft token never reaches an output: the worker samples its own token at every position and accepts drafts only as far
as they equal its tokens. So everything here is about speed.
"""

from sempre.engine.speculation.speculation import Ask, Incarnation, ModelSpeculation, Speculation, SpeculationPlan

__all__ = ["Ask", "Incarnation", "ModelSpeculation", "Speculation", "SpeculationPlan"]
