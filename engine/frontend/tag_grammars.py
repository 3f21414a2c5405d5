"""Structural tags as grammars: text up to a trigger, then one of the tags that begin with it, and so on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from sempre.engine.frontend.schema_lark import literal
from sempre.engine.frontend.schemas import SchemaRefused
from sempre.engine.structural_tags import TriggeredTags

Grammar = dict[str, object]


def tag_grammars(
    tags: TriggeredTags, contents: Sequence[Sequence[Grammar]], special_texts: Mapping[int, str], name: str
) -> list[list[Grammar]]:
    """Candidate lists of grammars, the best first; the first grammar of each is `name`, which uses the others.

    `contents` has candidates for each tag's content. Special tokens inside triggers and tags are written as such, since
    no text matches them. Raises SchemaRefused.
    """
    frame: Grammar = {"name": name, "lark_grammar": "\n".join(_frame(tags, special_texts))}
    count = max(map(len, contents))
    return [
        [frame, *({"name": f"content_{i}", **each[min(k, len(each) - 1)]} for i, each in enumerate(contents))]
        for k in range(count)
    ]


def _frame(tags: TriggeredTags, special_texts: Mapping[int, str]) -> list[str]:
    parts = {trigger: _parts(trigger, special_texts) for trigger in tags.triggers}
    in_text = [literal(trigger) for trigger, found in parts.items() if not found[0].startswith("<[")]
    rules = [
        # no text matches a special token, so it needs no complement
        "TEXT: /(?s:.*)/" + (f" & ~/(?s:.*)({'|'.join(in_text)})(?s:.*)/" if in_text else "")
    ]
    for index, (trigger, found) in enumerate(parts.items()):
        if any(part.startswith("<[") for part in found[1:]):
            raise SchemaRefused("", f"the trigger {trigger!r} has a special token that is not at its beginning.")
        if found[0].startswith("<["):
            rules.append(f"head_{index}: TEXT {' '.join(found)}")
        else:
            first, *others = found
            rules.append(f"opened_{index}[lazy]: TEXT {first}")
            rules.append(f"head_{index}: opened_{index} {' '.join(others)}")
    for index, tag in enumerate(tags.tags):
        ways = [
            f"head_{place} {' '.join(_parts(tag.begin.removeprefix(trigger), special_texts))}"
            for place, trigger in enumerate(parts)
            if tag.begin.startswith(trigger)
        ]
        rules.append(f"tag_{index}: ({' | '.join(ways)}) @content_{index} {' '.join(_parts(tag.end, special_texts))}")
    one = "(" + " | ".join(f"tag_{index}" for index in range(len(tags.tags))) + ")"
    if tags.stop_after_first:
        start = one if tags.at_least_one else f"{one} | TEXT"
    else:
        start = f"{one}{'+' if tags.at_least_one else '*'} TEXT"
    return [f"start: {start}", *rules]


def _parts(text: str, special_texts: Mapping[int, str]) -> list[str]:
    """A text as literals and special tokens."""
    ids = {special: token_id for token_id, special in special_texts.items() if special}
    if not ids:
        return [json.dumps(text)] if text else []
    longest_first = sorted(ids, key=len, reverse=True)
    found = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return [f"<[{ids[part]}]>" if part in ids else json.dumps(part) for part in found if part]
