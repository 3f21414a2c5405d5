// What is said about a run: its state, its figures, and whether a second one was equal.

import { byId, short } from "./elements.js";

export function say(text, bad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", bad);
}

// Without a run, or before its first chunk, the facts are empty.
export function showRun(run) {
  byId("seed-used").textContent = run?.seed ?? "–";
  byId("fingerprint").textContent = run?.fingerprint ?? "–";
  byId("count").textContent = run?.tokens.length ?? "–";
  byId("finish").textContent = run?.stopped ? "you" : (run?.finish ?? "–");
  byId("first").textContent = run?.firstMs === undefined ? "–" : `${short(run.firstMs)} ms`;
  byId("speed").textContent = run?.tokensPerS === undefined ? "–" : short(run.tokensPerS);
}

export function showVerdict(verdict) {
  const shown = byId("verdict");
  shown.hidden = !verdict;
  shown.textContent = verdict?.message ?? "";
  shown.className = verdict?.equal ? "equal" : "different";
}

export function showProgress(at, count, isEqual) {
  byId("progress").hidden = false;
  const [bar, text] = byId("progress").children;
  bar.value = count ? at / count : 1;
  text.textContent = isEqual ? `${at} of ${count} tokens the same so far` : `token ${at + 1} differs`;
}
