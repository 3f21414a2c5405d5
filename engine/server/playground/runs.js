// A run: {request, prefix, typedSeed, tokens, text, seed, fingerprint, finish, stopped, firstMs, tokensPerS}.

import { stream, tokensOf } from "./api.js";

export function newRun(request, prefix, typedSeed) {
  return { request, prefix, typedSeed, tokens: [], text: "", stopped: false };
}

// Fills `run` from the server; calls `onToken(token, index)` for each token and `onChunk()` after each chunk.
export async function receive(run, seed, apiKey, signal, { onToken, onChunk }) {
  const began = performance.now();
  let first;
  for await (const chunk of stream(run.request.path, run.request.body, seed, apiKey, signal)) {
    run.fingerprint = chunk.system_fingerprint ?? run.fingerprint;
    for (const choice of chunk.choices) {
      run.seed = choice.seed ?? run.seed;
      run.finish = choice.finish_reason ?? run.finish;
      run.text += choice.text ?? choice.delta?.content ?? "";
      for (const token of tokensOf(choice)) {
        run.tokens.push(token);
        onToken(token, run.tokens.length - 1);
      }
    }
    if (run.tokens.length) {
      const now = performance.now();
      first ??= { time: now, count: run.tokens.length };
      run.firstMs = first.time - began;
      const later = run.tokens.length - first.count;
      run.tokensPerS = later ? (1000 * later) / (now - first.time) : undefined;
    }
    onChunk();
  }
}

// The bytes of tokens and of one more as characters; undefined where they end within a character.
export function textOf(tokens, one) {
  const all = [...tokens, one].flatMap((token) => [...token.bytes]);
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(all));
  } catch {
    return undefined;
  }
}

// The whole answer: what was given of it and what was generated.
export function answerText(run) {
  return run.prefix + run.text;
}
