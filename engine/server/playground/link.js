// A link to a run: its request, its seed, the fingerprint, and a checksum for each token.

import { newRun } from "./runs.js";

const PREFIX = "#run=";
const VERSION = 1;

// FNV-1a of 32 bits over a token's id and the bits of its log-probabilities.
function checksum(token) {
  const names = [token.id ?? -1, token.text, ...token.alternatives.map((one) => one.text)].join("\n");
  const numbers = Float64Array.from([token.logprob, ...token.alternatives.map((one) => one.logprob)]);
  let hash = 0x811c9dc5;
  for (const part of [new TextEncoder().encode(names), new Uint8Array(numbers.buffer)]) {
    for (const byte of part) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  }
  return hash.toString(36);
}

function toText(bytes) {
  const binary = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function toBytes(text) {
  const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  return Uint8Array.from(binary, (character) => character.charCodeAt(0));
}

export function linkTo(run, model) {
  const held = {
    version: VERSION,
    model,
    ...run.request,
    seed: run.seed,
    prefix: run.prefix,
    fingerprint: run.fingerprint,
    finish: run.finish,
    checks: run.tokens.map(checksum),
  };
  return `${location.href.split("#")[0]}${PREFIX}${toText(new TextEncoder().encode(JSON.stringify(held)))}`;
}

function isRun({ version, path, body, checks, seed, prefix }) {
  const isText = typeof body?.prompt === "string" && path === "v1/completions";
  const isChat = Array.isArray(body?.messages) && path === "v1/chat/completions";
  const isKnown = version === VERSION && Array.isArray(checks) && typeof prefix === "string";
  return isKnown && (isText || isChat) && /^\d{1,20}$/.test(seed);
}

// The turns of a link's request, the last of them without its answer.
export function turnsOf(held) {
  if (!held.body.messages) {
    const prompt = held.body.prompt.slice(0, held.body.prompt.length - held.prefix.length);
    const only = { prompt, answers: [], chosen: 0 };
    return { first: only, last: only };
  }
  const messages = held.body.messages.filter((one) => one.role !== "system");
  if (held.prefix) messages.pop();
  const last = { prompt: messages.at(-1).content, answers: [], chosen: 0 };
  let first = last;
  for (let i = messages.length - 3; i >= 0; i -= 2) {
    const run = newRun({ path: held.path, body: held.body }, "", held.seed);
    const answer = { run: { ...run, text: messages[i + 1].content }, next: first };
    first = { prompt: messages[i].content, chosen: 0, answers: [answer] };
  }
  return { first, last };
}

// What the page's address links to; undefined if it is no link. Throws if the link is damaged.
export function readLink() {
  if (!location.hash.startsWith(PREFIX)) return undefined;
  try {
    const held = JSON.parse(new TextDecoder().decode(toBytes(location.hash.slice(PREFIX.length))));
    if (isRun(held)) return held;
  } catch {
    // told below
  }
  throw new Error("The link is damaged: it does not describe a run. Ask for it again.");
}

// Like compare(), against a link: {equal, at, message}.
export function compareWithLink(held, run) {
  const found = run.tokens.map(checksum);
  const common = Math.min(found.length, held.checks.length);
  let at = 0;
  while (at < common && found[at] === held.checks[at]) at++;
  const equal = at === found.length && at === held.checks.length && !run.stopped && run.finish === held.finish;
  const engine =
    held.fingerprint === run.fingerprint
      ? ` The fingerprint is the same.`
      : ` The link's run had fingerprint ${held.fingerprint}, this one has ${run.fingerprint}: another engine.`;
  if (equal) return { equal, at: -1, message: `The same answer as in the link: ${at} tokens and their log-probabilities.${engine}` };
  if (at < common) return { equal, at, message: `Not the answer of the link: token ${at + 1} differs.${engine}` };
  const lengths = `${held.checks.length} tokens in the link, ${found.length} here`;
  return { equal, at: -1, message: `Not the answer of the link: ${lengths}, finish reason ${run.stopped ? "stopped" : run.finish}.${engine}` };
}
