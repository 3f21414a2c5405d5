// The settings and the prompt: to a request, from a request, and kept across reloads.

import { byId } from "./elements.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"];
const KEPT = [...NUMBERS, "seed", "max_tokens", "alternatives", "stop", "system", "others"];

export function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

export function setMode(value) {
  document.querySelector(`input[name=mode][value=${value}]`).checked = true;
}

// Holds the caret in an empty last line of the prompt, and is no part of it.
export const LAST_LINE = "\u200b";

export function prompt() {
  const text = byId("prompt").textContent;
  return text.endsWith(LAST_LINE) ? text.slice(0, -LAST_LINE.length) : text;
}

export function setPrompt(text) {
  byId("prompt").textContent = text;
}

function settings() {
  const body = { stream: true, return_token_ids: true };
  for (const name of NUMBERS) if (byId(name).value !== "") body[name] = Number(byId(name).value);
  if (byId("stop").value !== "") body.stop = [byId("stop").value];
  return body;
}

// The request for `text`; in chat after `turns` ([{prompt, answer}]). `prefix` is a beginning of the answer that is
// given, as a branch has it.
export function toRequest(text, prefix, turns) {
  const body = settings();
  const [alternatives, most] = [Number(byId("alternatives").value), Number(byId("max_tokens").value)];
  if (mode() === "completion") {
    Object.assign(body, { prompt: text + prefix, logprobs: alternatives, max_tokens: most });
    return { path: "v1/completions", body };
  }
  const system = byId("system").value;
  body.messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    body.messages.push({ role: "user", content: turn.prompt }, { role: "assistant", content: turn.answer });
  }
  body.messages.push({ role: "user", content: text });
  if (prefix) {
    body.messages.push({ role: "assistant", content: prefix });
    Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  }
  Object.assign(body, { logprobs: true, top_logprobs: alternatives, max_completion_tokens: most });
  return { path: "v1/chat/completions", body };
}

// Sets the settings to those of a request; the prompt is set by the caller.
export function fromRequest({ path, body }, typedSeed) {
  const isChat = path === "v1/chat/completions";
  setMode(isChat ? "chat" : "completion");
  for (const name of NUMBERS) byId(name).value = body[name] ?? "";
  byId("stop").value = body.stop?.[0] ?? "";
  byId("seed").value = typedSeed;
  byId("max_tokens").value = isChat ? body.max_completion_tokens : body.max_tokens;
  byId("alternatives").value = isChat ? body.top_logprobs : body.logprobs;
  if (isChat) byId("system").value = body.messages[0]?.role === "system" ? body.messages[0].content : "";
}

// What the form asks for, less what chat keeps in its turns.
export function comparable({ path: where, body }) {
  const { messages, continue_final_message: _a, add_generation_prompt: _b, ...rest } = body;
  return JSON.stringify([where, rest, messages?.[0]?.role === "system" ? messages[0].content : ""]);
}

export function kept() {
  const values = Object.fromEntries(KEPT.map((id) => [id, byId(id).value]));
  return { ...values, mode: mode(), prompt: prompt() };
}

export function restore(values) {
  for (const id of KEPT) if (typeof values[id] === "string") byId(id).value = values[id];
  if (["completion", "chat"].includes(values.mode)) setMode(values.mode);
  if (typeof values.prompt === "string") setPrompt(values.prompt);
}
