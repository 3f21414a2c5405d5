// Conversations and settings, kept in this browser.
//
// A session is {id, mode, system, first}; a turn {prompt, answers, chosen}; an answer {run, next}, where `next` is the
// turn that follows it. So every branch keeps what came after it. The API key is never stored.

const KEY = "sempre.playground.1";
const MOST_SESSIONS = 40;

// JSON has no -0, which differs from 0 in its bits.
const packed = (number) => (Object.is(number, -0) ? "-0" : number);

function packOne({ text, bytes, logprob }) {
  return [text, [...bytes], packed(logprob)];
}

function unpackOne([text, bytes, logprob]) {
  return { text, bytes: Uint8Array.from(bytes), logprob: Number(logprob) };
}

export function packRun(run) {
  return { ...run, tokens: run.tokens.map((one) => [one.id, packOne(one), one.alternatives.map(packOne)]) };
}

export function unpackRun(run) {
  const tokens = run.tokens.map(([id, one, others]) => ({ id, ...unpackOne(one), alternatives: others.map(unpackOne) }));
  return { ...run, tokens };
}

function mapTurn(turn, convert) {
  if (!turn) return turn;
  const answers = turn.answers.map(({ run, next }) => ({ run: convert(run), next: mapTurn(next, convert) }));
  return { ...turn, answers };
}

// The turns shown now: from the first along the chosen answers.
export function path(session) {
  const turns = [];
  for (let turn = session?.first; turn; turn = turn.answers[turn.chosen]?.next) turns.push(turn);
  return turns;
}

export function lastAnswer(session) {
  const turn = path(session).at(-1);
  return turn?.answers[turn.chosen];
}

export class Store {
  sessions = [];
  settings = {};
  current = undefined;
  problem = ""; // what the user is to know about the storage

  constructor() {
    try {
      const found = JSON.parse(localStorage.getItem(KEY) ?? "{}");
      const read = (one) => ({ ...one, first: mapTurn(one.first, unpackRun) });
      this.sessions = (found.sessions ?? []).map(read);
      this.settings = found.settings ?? {};
      this.current = this.sessions.find((one) => one.id === found.current);
    } catch {
      this.problem = "What this browser had kept could not be read; the page starts afresh.";
    }
  }

  add(session) {
    this.sessions = [session, ...this.sessions].slice(0, MOST_SESSIONS);
    this.current = session;
  }

  remove(session) {
    this.sessions = this.sessions.filter((one) => one !== session);
    if (this.current === session) this.current = undefined;
  }

  // The oldest sessions give way where the browser's space is used up.
  save() {
    for (;;) {
      const sessions = this.sessions.map((one) => ({ ...one, first: mapTurn(one.first, packRun) }));
      const kept = { sessions, settings: this.settings, current: this.current?.id };
      try {
        localStorage.setItem(KEY, JSON.stringify(kept));
        return;
      } catch {
        if (this.sessions.length <= 1) {
          this.problem = "This browser keeps no more data: the history will not survive a reload.";
          return;
        }
        this.sessions = this.sessions.slice(0, -1);
      }
    }
  }
}
