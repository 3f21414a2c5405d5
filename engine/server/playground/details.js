// The card beside a token: its alternatives, each of which can start a branch.

import { alone } from "./characters.js";
import { element, percent, short, visible } from "./elements.js";
import { entropy, everyone, rank } from "./colours.js";

export class Details {
  #card;
  #frame;
  #announcement;
  #shown; // {view, index}
  #exact = false;
  isClosing = false;

  constructor(card, announcement) {
    this.#card = card;
    this.#frame = card.parentElement;
    this.#announcement = announcement;
    document.addEventListener("pointerdown", (event) => this.#closeOutside(event));
    card.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      const { view } = this.#shown;
      view.leave();
      this.isClosing = true;
      view.output.focus();
      this.isClosing = false;
    });
  }

  // A press elsewhere closes the card, which may cover what the user wants to press next.
  #closeOutside(event) {
    const view = this.#shown?.view;
    if (view && !this.#card.contains(event.target) && !view.output.contains(event.target)) view.leave();
  }

  announce(text) {
    this.#announcement.textContent = text;
  }

  // A pinned card can be used; one that only follows the pointer lets it through.
  show(view, index, isPinned) {
    this.#shown = { view, index };
    this.#card.hidden = false;
    this.#card.classList.toggle("pinned", isPinned);
    this.#card.replaceChildren(this.#table(view.tokens[index], index), ...this.#foot(view.tokens[index]));
    this.#place(view.output.children[index]);
  }

  close(view) {
    if (view && this.#shown?.view !== view) return;
    this.#card.hidden = true;
    this.announce("");
    this.#shown = undefined;
  }

  focus() {
    this.#card.querySelector("button")?.focus();
  }

  #place(token) {
    const frame = this.#frame.getBoundingClientRect();
    const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const most = Math.max(0, frame.width - this.#card.offsetWidth);
    this.#card.style.left = `${Math.min(Math.max(0, box.left - frame.left), most)}px`;
    this.#card.style.top = `${box.bottom - frame.top + 6}px`;
  }

  #foot(token) {
    const text = `Entropy of the listed: ${short(entropy(token))} bits. Rank ${rank(token)}.`;
    const all = element("button", { type: "button", className: "small", textContent: this.#exact ? "Three digits" : "All digits" });
    all.addEventListener("click", () => {
      this.#exact = !this.#exact;
      this.show(this.#shown.view, this.#shown.index, true);
      this.#card.querySelector("button.small").focus();
    });
    return [element("p", { textContent: text }), all];
  }

  #row(token, one) {
    const name = visible(alone(one));
    const cell = element("td", { dir: "auto" });
    const { view, index } = this.#shown;
    if (one.text !== token.text && view.branch) {
      const button = element("button", { type: "button", className: "rival", textContent: name });
      button.title = "Go on from here with this token instead";
      button.addEventListener("click", () => view.branch(index, one));
      cell.append(button);
    } else cell.textContent = name;
    const logprob = this.#exact ? String(one.logprob) : short(one.logprob);
    return element("tr", { className: one.text === token.text ? "chosen" : "" }, [
      cell,
      element("td", { textContent: percent(one.logprob) }),
      element("td", { textContent: logprob }),
    ]);
  }

  #table(token, index) {
    const head = ["token", "probability", "logprob"].map((textContent) => element("th", { textContent, scope: "col" }));
    return element("table", {}, [
      element("caption", { textContent: `Token ${index + 1}, id ${token.id ?? "unknown"}` }),
      element("thead", {}, [element("tr", {}, head)]),
      element("tbody", {}, everyone(token).map((one) => this.#row(token, one))),
    ]);
  }
}
