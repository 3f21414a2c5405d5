// The engine's load, once in two seconds while the page is visible, and whether the server answers at all.

import { get } from "./api.js";
import { byId } from "./elements.js";

const PERIOD_MS = 2000;

function show(id, text) {
  byId(id).textContent = text;
}

const sum = (values) => values?.reduce((total, value) => total + value, 0);

function sayGone(text) {
  byId("gone").hidden = text === "";
  if (byId("gone").textContent !== text) byId("gone").textContent = text;
}

export function watchEngine(apiKey, onReturn) {
  let before;
  let isGone = false;
  const read = async () => {
    try {
      const load = JSON.parse(await get("load", apiKey()));
      const usage = load.kv_cache_usage_perc?.reduce((most, one) => Math.max(most, one), 0);
      show("running", sum(load.num_requests_running) ?? load.server_load);
      show("waiting", sum(load.num_requests_waiting) ?? "–");
      show("kv", usage === undefined ? "–" : `${(100 * usage).toFixed(1)} %`);
      byId("kv-meter").value = usage ?? 0;
      const now = { tokens: load.generation_tokens, time: performance.now() };
      if (before?.tokens <= now.tokens) show("rate", ((1000 * (now.tokens - before.tokens)) / (now.time - before.time)).toFixed(0));
      before = now;
      sayGone("");
      if (isGone) onReturn();
      isGone = false;
    } catch (error) {
      for (const id of ["running", "waiting", "kv", "rate"]) show(id, "–");
      before = undefined;
      isGone ||= error.isUnreachable || error.status >= 500;
      if (error.isUnreachable) sayGone("The server is gone: it does not answer. It is asked again every two seconds; your text stays here.");
      else sayGone(error.status >= 500 ? `The server answers but is not ready: ${error.message}` : "");
    }
  };
  const loop = async () => {
    if (document.visibilityState === "visible") await read();
    setTimeout(loop, PERIOD_MS);
  };
  loop();
}
