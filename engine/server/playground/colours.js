// How strongly a token is tinted: one hue, from 0 (expected) to 4 (surprising).

const PROBABILITIES = [0.9, 0.5, 0.1, 0.01];
const BITS = [0.3, 1, 2, 3];
const RANKS = [2, 3, 4, 6];

export const LEGENDS = {
  off: [],
  probability: ["over 90 %", "50–90 %", "10–50 %", "1–10 %", "under 1 %"],
  entropy: ["under 0.3 bits", "0.3–1", "1–2", "2–3", "over 3 bits"],
  rank: ["first", "second", "third", "4–5", "lower"],
};
export const TITLES = {
  off: "",
  probability: "Probability of each token:",
  entropy: "Entropy among the listed alternatives:",
  rank: "Rank among the listed alternatives:",
};

// Bits over the listed tokens, the rest counted as one: a lower bound of the whole distribution's entropy.
export function entropy(token) {
  const listed = everyone(token).map((one) => Math.exp(one.logprob));
  const rest = Math.max(0, 1 - listed.reduce((sum, p) => sum + p, 0));
  return [...listed, rest].reduce((sum, p) => (p > 0 ? sum - p * Math.log2(p) : sum), 0);
}

// 1 for the most probable; tokens that are not listed come after all that are.
export function rank(token) {
  return 1 + token.alternatives.filter((one) => one.logprob > token.logprob).length;
}

// The alternatives and the token itself, each once, most probable first.
export function everyone(token) {
  const all = [...token.alternatives];
  if (!all.some((one) => one.text === token.text)) all.push(token);
  return all.sort((a, b) => b.logprob - a.logprob);
}

export function strength(token, colour) {
  if (colour === "probability") return PROBABILITIES.filter((bound) => Math.exp(token.logprob) < bound).length;
  if (colour === "entropy") return BITS.filter((bound) => entropy(token) >= bound).length;
  if (colour === "rank") return RANKS.filter((bound) => rank(token) >= bound).length;
  return 0;
}
