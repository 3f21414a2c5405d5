// The page: form to request, response to output, and comparison of two runs.

import { get, stream, tokensOf } from "./api.js";
import { compare } from "./comparison.js";
import { watchEngine } from "./engine_status.js";
import { TokenView } from "./tokens.js";

const byId = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"];

const view = new TokenView(byId("output"), byId("details"), byId("announcement"));
const apiKey = () => byId("api_key").value;
let request; // {path, body} of the last request
let typedSeed; // the form's seed for it
let lastRun;
let running; // AbortController of the current run

function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

function readForm() {
  const chat = mode() === "chat";
  const alternatives = Number(byId("alternatives").value);
  const body = { stream: true, return_token_ids: true };
  for (const name of NUMBERS) if (byId(name).value !== "") body[name] = Number(byId(name).value);
  if (byId("stop").value !== "") body.stop = [byId("stop").value];
  if (chat) {
    const system = byId("system").value;
    body.messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: byId("prompt").value }];
    Object.assign(body, { logprobs: true, top_logprobs: alternatives, max_completion_tokens: Number(byId("max_tokens").value) });
    return { path: "v1/chat/completions", body };
  }
  Object.assign(body, { prompt: byId("prompt").value, logprobs: alternatives, max_tokens: Number(byId("max_tokens").value) });
  return { path: "v1/completions", body };
}

function say(text, bad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", bad);
}

// Without a run, or before its first chunk, the facts are empty.
function showRun(run) {
  byId("seed-used").textContent = run?.seed ?? "–";
  byId("fingerprint").textContent = run?.fingerprint ?? "–";
  byId("count").textContent = run?.tokens.length ?? "–";
  byId("finish").textContent = run?.stopped ? "you" : (run?.finish ?? "–");
}

// Whether the form has changed since the last request.
function isEdited() {
  return JSON.stringify(readForm()) !== JSON.stringify(request) || byId("seed").value !== typedSeed;
}

// Hides the verdict once the form describes another request.
function followForm() {
  const edited = Boolean(request) && isEdited();
  if (edited) showVerdict();
  byId("again").disabled = Boolean(running) || !lastRun || edited;
}

function showVerdict(verdict) {
  const shown = byId("verdict");
  shown.hidden = !verdict;
  shown.textContent = verdict?.message ?? "";
  shown.className = verdict?.equal ? "equal" : "different";
}

function setRunning(controller) {
  running = controller;
  byId("generate").disabled = Boolean(controller);
  byId("stop-button").disabled = !controller;
  followForm();
}

async function receive(run, seed, signal) {
  for await (const chunk of stream(request.path, request.body, seed, apiKey(), signal)) {
    run.fingerprint = chunk.system_fingerprint ?? run.fingerprint;
    for (const choice of chunk.choices) {
      run.seed = choice.seed ?? run.seed;
      run.finish = choice.finish_reason ?? run.finish;
      for (const token of tokensOf(choice)) {
        run.tokens.push(token);
        view.add(token);
      }
    }
    showRun(run);
  }
}

// Returns the run, or undefined if it failed.
async function generate(seed) {
  const run = { tokens: [], stopped: false };
  const controller = new AbortController();
  setRunning(controller);
  view.clear();
  showRun();
  showVerdict();
  say("Generating…");
  try {
    await receive(run, seed, controller.signal);
    say("Done.");
  } catch (error) {
    if (!controller.signal.aborted) {
      say(error.message, true);
      return undefined;
    }
    run.stopped = true;
    say("Stopped.");
  } finally {
    view.end();
    setRunning();
  }
  showRun(run);
  return run;
}

async function start() {
  if (running || !byId("form").reportValidity()) return;
  request = readForm();
  typedSeed = byId("seed").value;
  lastRun = undefined;
  const run = await generate(byId("seed").value);
  lastRun = run?.seed === undefined ? undefined : run;
  setRunning();
}

async function runAgain() {
  const first = lastRun;
  const second = await generate(first.seed);
  if (!second) return;
  if (isEdited()) {
    say("Done. The form has changed since this request was sent.");
    return;
  }
  const verdict = compare(first, second);
  if (verdict.at >= 0) view.markDifference(verdict.at);
  showVerdict(verdict);
}

function showMode() {
  byId("system-row").hidden = mode() !== "chat";
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
for (const kind of ["input", "change"]) byId("form").addEventListener(kind, followForm);
byId("again").addEventListener("click", runAgain);
byId("stop-button").addEventListener("click", () => running?.abort());
for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", showMode);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start();
  }
  if (event.key === "Escape") running?.abort();
});

async function showModel() {
  try {
    byId("model").textContent = JSON.parse(await get("v1/models", apiKey())).data[0].id;
  } catch (error) {
    byId("model").textContent = "–";
    say(error.message, true);
  }
}

byId("api_key").addEventListener("change", showModel);
showMode();
showModel();
watchEngine(apiKey);
