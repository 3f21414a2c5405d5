// The page: prompt to request, response to text, and the comparison of two runs.

import { get } from "./api.js";
import { LEGENDS, TITLES } from "./colours.js";
import { compare, sameToken } from "./comparison.js";
import { Conversation } from "./conversation.js";
import { Details } from "./details.js";
import { openDrawer } from "./drawers.js";
import { sends } from "./editor.js";
import { byId, element, enable, isEnabled, onPress } from "./elements.js";
import { watchEngine } from "./engine_status.js";
import { say, showProgress, showRun, showVerdict } from "./facts.js";
import { comparable, fromRequest, kept, mode, prompt, restore, setMode, setPrompt, toRequest } from "./form.js";
import { showHistory } from "./history.js";
import { compareWithLink, linkTo, readLink, turnsOf } from "./link.js";
import { press } from "./pressure.js";
import { answerText, newRun, receive, textOf } from "./runs.js";
import { lastAnswer, path, Store } from "./session.js";

const store = new Store();
const details = new Details(byId("details"), byId("announcement"));
const conversation = new Conversation(details, { branch, choose });
const colours = { completion: "probability", chat: "off", ...store.settings.colours };
const apiKey = () => byId("api_key").value;
let running; // AbortController of the current run
let saving; // the timer of a save to come
let served; // the model's name

// The session that is shown; none while the other mode is chosen.
const session = () => (store.current?.mode === mode() ? store.current : undefined);

function save() {
  clearTimeout(saving);

  store.settings = { ...kept(), colours };
  store.save();
  if (store.problem) say(store.problem, true);
  store.problem = "";
}

// Whether the form has changed since the shown run's request.
function isEdited(run) {
  return comparable(toRequest(prompt(), run.prefix, [])) !== comparable(run.request) || byId("seed").value !== run.typedSeed;
}

// Says that the form describes another request than the one whose answer is shown, and hides the verdict.
function followForm() {
  const run = lastAnswer(session())?.run;
  const edited = Boolean(run) && isEdited(run);
  if (edited) showVerdict();
  byId("edited").hidden = !edited;
  byId("surface").classList.toggle("edited", edited);
  const usable = Boolean(run) && !running && run.seed !== undefined;
  enable(byId("again"), usable && !edited);
  enable(byId("share"), usable && !edited);
  enable(byId("copy"), Boolean(run));
  enable(byId("generate"), !running);
  enable(byId("stop-button"), Boolean(running));
  byId("examples").hidden = Boolean(session()) || prompt().trim() !== "";
  document.body.classList.toggle("has-run", Boolean(run));
}

// Everything that follows from the current session, the mode and the colour.
function show() {
  const isChat = mode() === "chat";
  byId("system-row").hidden = !isChat;
  document.body.classList.toggle("chat", isChat);
  byId("prompt").setAttribute("aria-label", isChat ? "Message" : "Prompt");
  byId("generate").textContent = isChat ? "Send" : "Generate";
  byId("colour").value = colours[mode()];
  const keys = LEGENDS[colours[mode()]].map((text, i) => element("span", { className: `key s${i}`, textContent: text }));
  byId("legend").replaceChildren(TITLES[colours[mode()]], ...keys.flatMap((key) => [" ", key]));
  conversation.show(session(), isChat, colours[mode()]);
  showRun(lastAnswer(session())?.run);
  byId("link-row").hidden = true;
  showHistory(store, { open: openSession, remove: removeSession });
  followForm();
}

function openSession(chosen) {
  if (running) return;
  store.current = chosen;
  const answer = lastAnswer(chosen);
  fromRequest(answer.run.request, answer.run.typedSeed);
  setPrompt(chosen.mode === "chat" ? "" : chosen.first.prompt);
  showVerdict();
  show();
  save();
}

function removeSession(chosen) {
  if (running) return;
  store.remove(chosen);
  show();
  save();
  byId("history-button").focus();
}

// Runs `work(signal)` as the one run of the page. Returns whether it ended by itself.
async function asRun(work) {
  const controller = new AbortController();
  running = controller;
  followForm();
  let release;
  try {
    const others = Number(byId("others").value);
    if (others) {
      say(`Starting ${others} other requests…`);
      release = await press(others, apiKey(), controller.signal);
    }
    controller.signal.throwIfAborted();
    say(others ? `Generating beside ${others} other requests…` : "Generating…");
    await work(controller.signal);
    say("Done.");
    return "done";
  } catch (error) {
    if (controller.signal.aborted) {
      say("Stopped.");
      return "stopped";
    }
    say(error.message, true);
    return "failed";
  } finally {
    release?.();
    running = undefined;
    followForm();
  }
}

// Generates a new answer of `turn`. A failed one is taken away again, an interrupted one stays.
async function generate(turn, request, { prefix, seed, typedSeed }) {
  const run = newRun(request, prefix, typedSeed);
  turn.answers.push({ run });
  turn.chosen = turn.answers.length - 1;
  showVerdict();
  show();
  const view = conversation.last;
  view.root.scrollIntoView({ block: "nearest" });
  const onToken = (token) => view.tokens.add(token);
  const onChunk = () => {
    view.format();
    showRun(run);
  };
  const ended = await asRun((signal) => receive(run, seed, apiKey(), signal, { onToken, onChunk }));
  view.tokens.end();
  run.stopped = ended === "stopped";
  if (ended === "failed" || (run.stopped && !run.tokens.length)) removeAnswer(turn, run);
  const said = byId("status").textContent;
  show();
  save();
  if (ended === "failed") say(said, true);
  else conversation.last?.root.scrollIntoView({ block: "nearest" });
  return ended === "failed" ? undefined : run;
}

function removeAnswer(turn, run) {
  turn.answers = turn.answers.filter((one) => one.run !== run);
  turn.chosen = Math.max(0, turn.answers.length - 1);
  if (turn.answers.length) return;
  const before = path(store.current).find((one) => one.answers.some((answer) => answer.next === turn));
  if (before) before.answers[before.chosen].next = undefined;
  else store.remove(store.current);
  if (mode() === "chat") setPrompt(turn.prompt);
}

function isValid() {
  if (byId("form").checkValidity()) return true;
  openDrawer("settings");
  byId("form").reportValidity();
  return false;
}

function newSession(turn) {
  store.add({ id: crypto.getRandomValues(new Uint32Array(2)).join("-"), mode: mode(), first: turn });
}

async function start() {
  if (running || !isValid()) return;
  const text = prompt();
  if (text === "") {
    say("Write something first.", true);
    byId("prompt").focus();
    return;
  }
  const typedSeed = byId("seed").value;
  const current = session();
  const turns = mode() === "chat" ? path(current) : [];
  const before = turns.map((turn) => ({ prompt: turn.prompt, answer: answerText(turn.answers[turn.chosen].run) }));
  const request = toRequest(text, "", before);
  let turn = { prompt: text, answers: [], chosen: 0 };
  if (turns.length) lastAnswer(current).next = turn;
  else if (current && mode() === "completion" && current.first.prompt === text) turn = current.first;
  else newSession(turn);
  if (mode() === "chat") setPrompt("");
  await generate(turn, request, { prefix: "", seed: typedSeed, typedSeed });
}

// A rival token starts another answer of the last turn; the answer so far stays.
async function branch(answer, index, rival) {
  if (running) return;
  const begun = textOf(answer.run.tokens.slice(0, index), rival);
  if (begun === undefined) {
    say("This token ends within a character, so no branch can start after it.", true);
    return;
  }
  const turn = path(store.current).at(-1);
  const prefix = answer.run.prefix + begun;
  const { body, path: where } = answer.run.request;
  const changed = { ...body };
  if (body.messages) {
    const messages = answer.run.prefix ? body.messages.slice(0, -1) : body.messages;
    changed.messages = [...messages, { role: "assistant", content: prefix }];
    Object.assign(changed, { continue_final_message: true, add_generation_prompt: false });
  } else changed.prompt = turn.prompt + prefix;
  await generate(turn, { path: where, body: changed }, { prefix, seed: answer.run.seed, typedSeed: answer.run.typedSeed });
  conversation.last?.tokens.output.focus({ preventScroll: true });
}

function choose(turn, index, label) {
  if (running) return;
  turn.chosen = index;
  showVerdict();
  show();
  save();
  document.querySelector(`.branches button[aria-label="${label}"]`)?.focus();
}

// Sends the shown run's request again; each token is confirmed in place, or replaced from the first that differs.
async function runAgain() {
  const turn = path(store.current).at(-1);
  const first = turn.answers[turn.chosen].run;
  const second = newRun(first.request, first.prefix, first.typedSeed);
  const view = conversation.last.tokens;
  showVerdict();
  view.leave();
  view.expect();
  let differs = -1;
  const onToken = (token, i) => {
    if (differs >= 0) return view.add(token);
    if (i < first.tokens.length && sameToken(first.tokens[i], token)) return view.confirm(i);
    differs = i;
    view.cut(i);
    view.add(token);
    return view.markDifference(i);
  };
  const onChunk = () => showProgress(differs < 0 ? second.tokens.length : differs, first.tokens.length, differs < 0);
  showProgress(0, first.tokens.length, true);
  const ended = await asRun((signal) => receive(second, first.seed, apiKey(), signal, { onToken, onChunk }));
  byId("progress").hidden = true;
  if (ended === "failed") {
    const said = byId("status").textContent;
    show();
    say(said, true);
    return;
  }
  second.stopped = ended === "stopped";
  const verdict = compare(first, second);
  if (verdict.equal && view.colour === colours[mode()]) view.settle();
  else if (verdict.equal) show();
  else {
    turn.answers.push({ run: second });
    turn.chosen = turn.answers.length - 1;
    show();
    conversation.last.tokens.markDifference(verdict.at);
    save();
  }
  if (verdict.equal && !second.stopped) showRun(second);
  if (isEdited(first)) say("Done. The form has changed since this request was sent.");
  else showVerdict(verdict);
}

async function copyText(text, said) {
  try {
    await navigator.clipboard.writeText(text);
    say(said);
  } catch {
    say("The browser does not let the page copy; select the text and copy it by hand.", true);
  }
}

async function copy() {
  const turns = path(store.current);
  const of = (turn) => answerText(turn.answers[turn.chosen].run);
  if (mode() === "chat") return copyText(of(turns.at(-1)), "The last answer is copied.");
  return copyText(turns[0].prompt + of(turns[0]), "The text is copied.");
}

async function share() {
  const address = linkTo(lastAnswer(store.current).run, served);
  byId("link-row").hidden = false;
  byId("link").value = address;
  byId("link").select();
  await copyText(address, "The link is copied.");
}

// Runs what the address links to and says whether the answer is the same.
async function openLink() {
  let held;
  try {
    held = readLink();
  } catch (error) {
    say(error.message, true);
  }
  history.replaceState(undefined, "", location.pathname + location.search);
  if (!held || running) return;
  fromRequest(held, held.seed);
  const { first, last } = turnsOf(held);
  setPrompt(mode() === "chat" ? "" : last.prompt);
  if (held.model !== served) {
    setPrompt(last.prompt);
    store.current = undefined;
    show();
    say(`The link is of the model ${held.model}; this server has ${served}. Nothing was sent.`, true);
    return;
  }
  newSession(first);
  const request = { path: held.path, body: held.body };
  const run = await generate(last, request, { prefix: held.prefix, seed: held.seed, typedSeed: held.seed });
  if (!run) return;
  const verdict = compareWithLink(held, run);
  if (verdict.at >= 0) conversation.last.tokens.markDifference(verdict.at);
  showVerdict(verdict);
}

async function showModel() {
  try {
    served = JSON.parse(await get("v1/models", apiKey())).data[0].id;
    byId("model").textContent = served;
  } catch (error) {
    byId("model").textContent = "–";
    say(error.message, true);
  }
}

document.addEventListener("keydown", (event) => {
  if (sends(event)) {
    event.preventDefault();
    start();
  }
  if (event.key !== "Escape") return;
  const drawer = event.target.closest("aside");
  if (drawer) openDrawer(drawer.id, false);
  else running?.abort();
});
for (const part of ["prompt", "form", "others"]) {
  byId(part).addEventListener("input", () => {
    byId("others-count").value = byId("others").value;
    followForm();
    clearTimeout(saving);
    saving = setTimeout(save, 400);
  });
}
addEventListener("pagehide", save);
byId("form").addEventListener("submit", (event) => event.preventDefault());
// released at a number: the shown run is sent again beside that many others
byId("others").addEventListener("change", () => isEnabled(byId("again")) && Number(byId("others").value) && runAgain());
onPress(byId("generate"), start);
onPress(byId("again"), runAgain);
onPress(byId("stop-button"), () => running?.abort());
onPress(byId("copy"), copy);
onPress(byId("share"), share);
onPress(byId("new"), () => {
  if (running) return;
  store.current = undefined;
  setPrompt("");
  showVerdict();
  show();
  save();
  say("Ready.");
  byId("prompt").focus();
});
for (const radio of document.querySelectorAll("input[name=mode]")) {
  radio.addEventListener("change", () => {
    showVerdict();
    show();
    save();
  });
}
byId("colour").addEventListener("change", () => {
  colours[mode()] = byId("colour").value;
  if (!running) show();
  save();
});
for (const button of byId("examples").querySelectorAll("button")) {
  onPress(button, () => {
    setPrompt(button.textContent);
    start();
  });
}
byId("api_key").addEventListener("change", showModel);
addEventListener("hashchange", openLink);

restore(store.settings);
byId("others-count").value = byId("others").value;
show();
if (store.problem) say(store.problem, true);
watchEngine(apiKey, showModel);
await showModel();
await openLink();
