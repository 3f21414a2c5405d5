// The output: one element per token, coloured by probability, with its alternatives on hover and by keyboard.
// Model output is only ever set as textContent.

import { alone, Characters } from "./characters.js";

const BOUNDS = [0.01, 0.1, 0.5, 0.9];

export function element(name, properties = {}, children = []) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// shown for a token that only begins a character
const BEGINS = "·";

function visible(text) {
  return text === "" ? "∅" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return `${p < 0.1 ? p.toExponential(1) : p.toFixed(1)} %`;
}

export class TokenView {
  #frame;
  #details;
  #announcement;
  #tokens = [];
  #active = -1;
  #characters = new Characters();

  constructor(output, details, announcement) {
    this.output = output;
    this.#frame = output.parentElement;
    this.#details = details;
    this.#announcement = announcement;
    output.addEventListener("pointerover", (event) => this.#show(this.#indexOf(event.target)));
    output.addEventListener("pointerleave", () => this.#show(this.#active));
    output.addEventListener("keydown", (event) => this.#key(event));
    output.addEventListener("click", (event) => this.#activate(this.#indexOf(event.target)));
    output.addEventListener("focus", () => this.#focused());
    output.addEventListener("blur", () => this.#activate(-1));
  }

  clear() {
    this.#tokens = [];
    this.#active = -1;
    this.#characters = new Characters();
    this.output.replaceChildren();
    this.#details.hidden = true;
    this.#announcement.textContent = "";
  }

  add(token) {
    const bucket = BOUNDS.filter((bound) => Math.exp(token.logprob) >= bound).length;
    const begins = token.bytes.length ? BEGINS : "∅";
    const text = this.#characters.of(token).replaceAll("\n", "⏎\n");
    this.#tokens.push(token);
    const part = text === "" && token.bytes.length ? " part" : "";
    this.output.append(element("span", { className: `token p${bucket}${part}`, textContent: text || begins }));
  }

  // The output has ended: shows the bytes of an incomplete character.
  end() {
    const rest = this.#characters.end();
    if (rest && this.#tokens.length) this.output.lastElementChild.textContent = rest;
  }

  markDifference(index) {
    this.output.children[index]?.classList.add("differs");
  }

  #indexOf(target) {
    const token = target.closest(".token");
    return token ? [...this.output.children].indexOf(token) : -1;
  }

  // Keyboard focus shows the first token; a pointer selects its own.
  #focused() {
    if (this.output.matches(":focus-visible")) this.#activate(this.#active < 0 ? 0 : this.#active);
  }

  #key(event) {
    const last = this.#tokens.length - 1;
    const steps = { ArrowRight: this.#active + 1, ArrowLeft: this.#active - 1, Home: 0, End: last };
    if (!(event.key in steps) || last < 0) return;
    event.preventDefault();
    this.#activate(Math.min(Math.max(steps[event.key], 0), last));
  }

  #activate(index) {
    this.output.children[this.#active]?.classList.remove("active");
    this.#active = index < this.#tokens.length ? index : -1;
    this.output.children[this.#active]?.classList.add("active");
    this.#show(this.#active);
    const token = this.#tokens[this.#active];
    if (token) this.#announcement.textContent = `Token ${index + 1}: ${visible(alone(token))}, ${percent(token.logprob)}`;
  }

  #show(index) {
    const token = this.#tokens[index];
    this.#details.hidden = !token;
    if (!token) return;
    this.#details.replaceChildren(this.#table(index, token));
    const place = this.output.children[index];
    const most = Math.max(0, this.#frame.clientWidth - this.#details.offsetWidth);
    this.#details.style.left = `${Math.min(place.offsetLeft, most)}px`;
    this.#details.style.top = `${place.offsetTop + place.offsetHeight + 6}px`;
  }

  #table(index, token) {
    const alternatives = [...token.alternatives];
    if (!alternatives.some((one) => one.text === token.text)) alternatives.push(token);
    alternatives.sort((a, b) => b.logprob - a.logprob);
    const row = (one) =>
      element("tr", { className: one.text === token.text ? "chosen" : "" }, [
        element("td", { textContent: visible(alone(one)), dir: "auto" }),
        element("td", { textContent: percent(one.logprob) }),
        element("td", { textContent: String(one.logprob) }),
      ]);
    const head = ["token", "probability", "logprob"].map((textContent) => element("th", { textContent, scope: "col" }));
    return element("table", {}, [
      element("caption", { textContent: `Token ${index + 1}, id ${token.id ?? "unknown"}` }),
      element("thead", {}, [element("tr", {}, head)]),
      element("tbody", {}, alternatives.map(row)),
    ]);
  }
}
