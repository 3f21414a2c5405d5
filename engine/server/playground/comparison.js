// Whether two runs gave the same bits.

// JSON writes a float32 with enough digits to identify it, so equal doubles mean equal bits; Object.is also
// distinguishes 0 from -0.
export function sameToken(a, b) {
  return (
    a.id === b.id &&
    a.text === b.text &&
    Object.is(a.logprob, b.logprob) &&
    a.alternatives.length === b.alternatives.length &&
    a.alternatives.every((one, i) => one.text === b.alternatives[i].text && Object.is(one.logprob, b.alternatives[i].logprob))
  );
}

function countLogprobs(token) {
  const listed = token.alternatives.some((one) => one.text === token.text);
  return token.alternatives.length + (listed ? 0 : 1);
}

// A run: {tokens, fingerprint, seed, finish, stopped}. Returns {equal, at, message}; `at` is the first token that
// differs, or -1. A stopped run is compared up to its end.
export function compare(first, second) {
  const partial = first.stopped || second.stopped;
  const common = Math.min(first.tokens.length, second.tokens.length);
  let at = 0;
  while (at < common && sameToken(first.tokens[at], second.tokens[at])) at++;
  const sameLength = partial || first.tokens.length === second.tokens.length;
  const sameFacts = first.seed === second.seed && (partial || first.finish === second.finish);
  const equal = at === common && sameLength && sameFacts;
  return { equal, at: equal || at === common ? -1 : at, message: describe(first, second, equal, at, common, partial) };
}

function describe(first, second, equal, at, common, partial) {
  const changed = first.fingerprint !== second.fingerprint;
  const engine = changed
    ? ` The fingerprint changed from ${first.fingerprint} to ${second.fingerprint}: this is a different engine.`
    : "";
  if (equal) {
    const numbers = second.tokens.slice(0, common).reduce((sum, token) => sum + countLogprobs(token), 0);
    const extent = partial ? "up to the end of the shorter run, " : "";
    return `Equal bits: ${extent}${common} tokens and ${numbers} log-probabilities are the same.${engine}`;
  }
  if (at < common) {
    const [a, b] = [first.tokens[at], second.tokens[at]];
    return (
      `Different: token ${at + 1} was ${JSON.stringify(a.text)} (${a.logprob}), ` +
      `and is now ${JSON.stringify(b.text)} (${b.logprob}).${engine}`
    );
  }
  return (
    `Different: ${first.tokens.length} tokens, seed ${first.seed}, ended by ${first.finish}; ` +
    `now ${second.tokens.length} tokens, seed ${second.seed}, ended by ${second.finish}.${engine}`
  );
}
