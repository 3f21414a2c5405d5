"""What `sempre replay` prints: each difference as it is found, and the verdict."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from sempre.engine.cli.exit_codes import EXIT_DIFFERENT, EXIT_NOT_JUDGED, EXIT_OK
from sempre.ipc.log_lines import plain

if TYPE_CHECKING:
    from sempre.engine.proof.replay import Replayed


class ReplayReport:
    """Counts, and prints lines for people or one JSON object."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._passes: set[bool] = set()
        self._num_outputs = self._num_tokens = 0
        self._different: list[dict[str, Any]] = []
        self._not_judged: list[dict[str, Any]] = []
        self._changed: dict[str, None] = {}
        self._bar: Any = None

    @property
    def has_differences(self) -> bool:
        """Whether an output was not as recorded."""
        return bool(self._different)

    def note_pass(self, *, is_one_pass: bool) -> None:
        """Note how outputs are computed that only are to be scored: in one pass, or token by token."""
        self._passes.add(is_one_pass)

    def begin(self, count: int | None) -> None:
        """Show progress at a terminal; None: nobody knows how many there will be."""
        from tqdm import tqdm

        self._bar = tqdm(total=count, unit=" outputs", disable=not sys.stderr.isatty())

    def add_bad_line(self, error: Exception) -> None:
        """Count a line that is no valid receipt."""
        self._not_judged.append({"name": None, "problem": str(error)})
        self._say(f"not judged: {error}")

    def add(self, replayed: Replayed) -> None:
        """Count one result, and print it unless it is equal."""
        self._changed.update(dict.fromkeys(replayed.changed_parts))
        self._bar.update()
        if replayed.problem is not None:
            self._not_judged.append({"name": replayed.name, "problem": replayed.problem})
            self._say(f"{replayed.name}: not judged: {replayed.problem}")
            return
        self._num_outputs += 1
        self._num_tokens += replayed.num_tokens
        if replayed.difference is not None:
            self._different.append({"name": replayed.name, **replayed.difference.to_dict()})
            self._say(f"{replayed.name}: different: {replayed.difference.sentence()}")

    def close(self) -> None:
        """End the progress bar."""
        if self._bar is not None:
            self._bar.close()

    def end(self) -> int:
        """Print the verdict; return the exit code."""
        changed = list(self._changed)
        # nothing at all is not equal to anything
        incomplete = bool(self._not_judged) or not self._num_outputs
        if self._as_json:
            found = {
                "verdict": "different" if self._different else "not judged" if incomplete else "equal",
                "outputs": self._num_outputs,
                "tokens": self._num_tokens,
                "different": self._different,
                "not_judged": self._not_judged,
                "fingerprint_changes": changed,
            }
            print(json.dumps(found, ensure_ascii=False))
        else:
            print(self._verdict())
            if changed:
                print(f"the fingerprint is not the recorded one: {plain('; '.join(changed))}")
        return EXIT_DIFFERENT if self._different else EXIT_NOT_JUDGED if incomplete else EXIT_OK

    def _verdict(self) -> str:
        what = f"{self._num_outputs:,} {'output' if self._num_outputs == 1 else 'outputs'}, {self._num_tokens:,} tokens"
        if self._different:
            text = f"{what}: {len(self._different):,} different"
        elif self._num_outputs:
            text = f"{what}: equal, bit for bit"
            if True in self._passes:
                text += " (log-probabilities of the recorded tokens; sampling was not repeated)"
            if False in self._passes:
                text += " (generated token by token: recurrent layers compute a prompt in another order)"
        else:
            text = "no output was judged"
        return text + (f"; {len(self._not_judged):,} not judged" if self._not_judged else "")

    def _say(self, text: str) -> None:
        if not self._as_json:
            print(plain(text), flush=True)
