// The shown text: in completion the answer follows the prompt in one text, in chat there is a turn above another.

import { byId, element, onPress } from "./elements.js";
import { formatted } from "./markdown.js";
import { path } from "./session.js";
import { TokenView } from "./tokens.js";

// One answer: as formatted text (chat without colours) or as tokens.
class AnswerView {
  constructor(run, details, { colour, isChat, branch }) {
    this.run = run;
    this.isFormatted = isChat && colour === "off";
    this.tokens = new TokenView(details, { colour, branch });
    this.prefix = element("span", { className: "prefix", textContent: run.prefix, title: "The given beginning of this branch" });
    this.root = element(isChat ? "div" : "span", { className: "answer", dir: "auto" });
    if (this.isFormatted) this.format();
    else this.root.append(this.prefix, this.tokens.output);
    for (const token of run.tokens) this.tokens.add(token);
    if (run.finish || run.stopped) this.tokens.end();
  }

  // Called for each chunk; what is not complete yet is formatted as it stands.
  format() {
    if (!this.isFormatted) return;
    this.root.classList.add("markdown");
    this.root.replaceChildren(formatted(this.run.prefix + this.run.text));
  }
}

export class Conversation {
  #details;
  #acts;
  last; // the AnswerView of the last answer

  // `acts`: {branch(answer, index, rival), choose(turn, index)}.
  constructor(details, acts) {
    this.#details = details;
    this.#acts = acts;
  }

  show(session, isChat, colour) {
    this.#details.close();
    this.last = undefined;
    const turns = path(session);
    byId("turns").replaceChildren();
    byId("continuation").replaceChildren();
    byId("branches").replaceChildren();
    for (const turn of turns) {
      const answer = turn.answers[turn.chosen];
      const branch = turn === turns.at(-1) ? (index, rival) => this.#acts.branch(answer, index, rival) : undefined;
      const view = answer && new AnswerView(answer.run, this.#details, { colour, isChat, branch });
      if (!isChat) {
        if (view) byId("continuation").append(view.root);
        byId("branches").append(...this.#branches(turn));
      } else {
        const asked = element("p", { className: "asked", dir: "auto", textContent: turn.prompt });
        const parts = view ? [asked, view.root, ...this.#branches(turn)] : [asked];
        byId("turns").append(element("li", { className: "turn" }, parts));
      }
      this.last = view;
    }
    if (this.last) this.last.tokens.output.id = "output";
    if (this.last?.isFormatted) this.last.root.id = "output";
  }

  #branches(turn) {
    const count = turn.answers.length;
    if (count < 2) return [];
    const step = (by, name, label) => {
      const button = element("button", { type: "button", className: "small", textContent: name, ariaLabel: label });
      onPress(button, () => this.#acts.choose(turn, (turn.chosen + by + count) % count, label));
      return button;
    };
    const text = element("span", { className: "of", textContent: `Branch ${turn.chosen + 1} of ${count}` });
    const parts = [step(-1, "‹", "Previous branch"), text, step(1, "›", "Next branch")];
    return [element("span", { className: "branches" }, parts)];
  }
}
