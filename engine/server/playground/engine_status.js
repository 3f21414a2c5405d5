// The engine's load, once a second while the page is visible.

import { get } from "./api.js";

const PERIOD_MS = 1000;

// Sums a metric over its labels, under any prefix.
export function metric(exposition, name) {
  const pattern = new RegExp(`^\\w+:${name}(?:\\{[^}]*\\})? (\\S+)`, "gm");
  const values = [...exposition.matchAll(pattern)].map((match) => Number(match[1]));
  return values.length ? values.reduce((sum, value) => sum + value, 0) : undefined;
}

function show(id, text) {
  document.getElementById(id).textContent = text;
}

export function watchEngine(apiKey) {
  let before;
  const read = async () => {
    try {
      const [exposition, load] = await Promise.all([get("metrics"), get("load", apiKey()).then(JSON.parse)]);
      const usage = load.kv_cache_usage_perc?.reduce((most, one) => Math.max(most, one), 0);
      show("running", metric(exposition, "num_requests_running") ?? load.server_load);
      show("waiting", metric(exposition, "num_requests_waiting") ?? "–");
      show("kv", usage === undefined ? "–" : `${(100 * usage).toFixed(1)} %`);
      document.getElementById("kv-meter").value = usage ?? 0;
      const now = { tokens: metric(exposition, "generation_tokens_total"), time: performance.now() };
      if (before && now.tokens !== undefined) {
        show("rate", ((1000 * (now.tokens - before.tokens)) / (now.time - before.time)).toFixed(0));
      }
      before = now;
    } catch {
      for (const id of ["running", "waiting", "kv", "rate"]) show(id, "–");
      before = undefined;
    }
  };
  const loop = async () => {
    if (document.visibilityState === "visible") await read();
    setTimeout(loop, PERIOD_MS);
  };
  loop();
}
