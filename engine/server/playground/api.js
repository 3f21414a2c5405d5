// Requests to this server: streamed responses as tokens.

import { bytesOf } from "./characters.js";

const DONE = "[DONE]";

// A seed has up to 64 bits, a JavaScript number 53: seeds stay text both ways. An unescaped `,"seed":` can only be a
// key, since quotes within JSON strings are escaped.
export function parseChunk(json) {
  return JSON.parse(json.replace(/([{,]"seed":)(\d+)/g, '$1"$2"'));
}

export function encodeBody(body, seed) {
  const text = JSON.stringify(body);
  return seed === "" ? text : `${text.slice(0, -1)},"seed":${BigInt(seed)}}`;
}

function headers(apiKey) {
  return { "Content-Type": "application/json", ...(apiKey ? { Authorization: `Bearer ${apiKey}` } : {}) };
}

// A refusal of the server, or its absence.
class RequestError extends Error {
  constructor(message, { status, isUnreachable = false }) {
    super(message);
    this.status = status;
    this.isUnreachable = isUnreachable;
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("The server cannot be reached: it has stopped, or the network is down.", { isUnreachable: true });
  }
}

function messageOf(text, status) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The server responded with status ${status}.`;
  }
}

export async function get(path, apiKey) {
  const response = await reach(path, { headers: headers(apiKey), cache: "no-store" });
  const text = await response.text();
  if (!response.ok) throw new RequestError(messageOf(text, response.status), response);
  return text;
}

// Yields the chunks of a streamed response. Throws the server's error message if it refuses or fails.
export async function* stream(path, body, seed, apiKey, signal) {
  const response = await reach(path, { method: "POST", headers: headers(apiKey), body: encodeBody(body, seed), signal });
  if (!response.ok) throw new RequestError(messageOf(await response.text(), response.status), response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (signal?.aborted) throw error;
      return { done: true };
    });
    if (done) throw new Error("The connection closed before the response was complete: the server may have stopped.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === DONE) return;
      const chunk = parseChunk(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

function named(text, logprob, bytes) {
  return { text, logprob, bytes: bytesOf(text, bytes) };
}

// The tokens of one choice, in the same form for both interfaces: {id, text, bytes, logprob, alternatives: [{text, bytes,
// logprob}]}; `text` is the server's name of the token.
export function tokensOf(choice) {
  const ids = choice.token_ids ?? [];
  const logprobs = choice.logprobs;
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((entry, i) => ({
      id: ids[i],
      ...named(entry.token, entry.logprob, entry.bytes),
      alternatives: entry.top_logprobs.map(({ token, logprob, bytes }) => named(token, logprob, bytes)),
    }));
  }
  return logprobs.tokens.map((text, i) => ({
    id: ids[i],
    ...named(text, logprobs.token_logprobs[i]),
    alternatives: Object.entries(logprobs.top_logprobs[i] ?? {}).map(([other, logprob]) => named(other, logprob)),
  }));
}
