// Other requests beside the user's own, so that equality under load can be seen.

import { stream } from "./api.js";

// Browsers open about six connections to a server; a request with several prompts is several sequences in the engine.
const CONNECTIONS = 3;
const WORDS = "A ship sails while seven old clocks count backwards under the quiet green lamp of winter".split(" ");

function prompts(count, round) {
  return Array.from({ length: count }, (_, i) => WORDS.slice(0, 1 + ((i + round) % WORDS.length)).join(" "));
}

async function keepBusy(count, lane, apiKey, signal, begun) {
  for (let round = 0; !signal.aborted; round++) {
    const body = { prompt: prompts(count, round + 5 * lane), max_tokens: 48 + 32 * lane, ignore_eos: true, stream: true };
    for await (const _chunk of stream("v1/completions", body, "", apiKey, signal)) begun();
  }
}

// Starts `count` sequences. Resolves, once all connections have had a first token, to a function that ends them.
export async function press(count, apiKey, signal) {
  const controller = new AbortController();
  signal.addEventListener("abort", () => controller.abort());
  const lanes = Math.min(CONNECTIONS, count);
  const share = (lane) => Math.floor(count / lanes) + (lane < count % lanes ? 1 : 0);
  const starts = Array.from({ length: lanes }, (_, lane) => {
    const size = share(lane);
    return new Promise((begun, fail) => {
      keepBusy(size, lane, apiKey, controller.signal, begun).catch((error) => {
        if (controller.signal.aborted) begun();
        else fail(error);
      });
    });
  });
  try {
    await Promise.all(starts);
  } catch (error) {
    controller.abort();
    throw new Error(`The other requests failed: ${error.message}`, { cause: error });
  }
  return () => controller.abort();
}
