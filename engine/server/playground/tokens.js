// One output: an element per token, tinted by how surprising it was, with its details on hover, tap and by keyboard.
// Model output is only ever set as textContent.

import { alone, Characters } from "./characters.js";
import { element, percent, visible } from "./elements.js";
import { strength } from "./colours.js";

// shown for a token that only begins a character
const BEGINS = "·";

export class TokenView {
  #details;
  #tokens = [];
  #active = -1;
  #characters = new Characters();

  // `details` is shared by all outputs; `branch(index, rival)` is called when a rival token is chosen.
  constructor(details, { colour, branch }) {
    this.colour = colour;
    this.branch = branch;
    this.#details = details;
    this.output = element("span", { className: "output", tabIndex: 0, dir: "auto" });
    this.output.setAttribute("role", "group");
    this.output.setAttribute("aria-label", "Tokens; use the arrow keys to move between them");
    this.output.addEventListener("pointerover", (event) => this.#hover(this.#indexOf(event.target)));
    this.output.addEventListener("pointerleave", () => this.#hover(this.#active));
    this.output.addEventListener("keydown", (event) => this.#key(event));
    this.output.addEventListener("click", (event) => this.#activate(this.#indexOf(event.target)));
    this.output.addEventListener("focus", () => this.#focused());
  }

  get tokens() {
    return this.#tokens;
  }

  add(token) {
    const begins = token.bytes.length ? BEGINS : "∅";
    const text = this.#characters.of(token).replaceAll("\n", "⏎\n");
    this.#tokens.push(token);
    const part = text === "" && token.bytes.length ? " part" : "";
    const className = `token s${strength(token, this.colour)}${part}`;
    this.output.append(element("span", { className, textContent: text || begins }));
  }

  // The output has ended: shows the bytes of an incomplete character.
  end() {
    const rest = this.#characters.end();
    if (rest && this.#tokens.length) this.output.lastElementChild.textContent = rest;
  }

  // Before a second run: what it has not reached yet is faint.
  expect() {
    for (const one of this.output.children) one.classList.add("pending");
  }

  // The second run gave the same bits for this token.
  confirm(index) {
    const one = this.output.children[index];
    one.classList.remove("pending");
    one.classList.add("same");
  }

  settle() {
    for (const one of this.output.children) one.classList.remove("pending");
  }

  // Removes the tokens from `index` on.
  cut(index) {
    const kept = this.#tokens.slice(0, index);
    while (this.output.children.length > index) this.output.lastElementChild.remove();
    this.#tokens = kept;
    this.#characters = new Characters();
    for (const token of kept) this.#characters.of(token);
    this.leave();
  }

  markDifference(index) {
    this.output.children[index]?.classList.add("differs");
  }

  // Closes the details and forgets the selected token.
  leave() {
    this.output.children[this.#active]?.classList.remove("active");
    this.#active = -1;
    this.#details.close(this);
  }

  #indexOf(target) {
    const token = target.closest(".token");
    return token ? [...this.output.children].indexOf(token) : -1;
  }

  // Keyboard focus shows the first token; a pointer selects its own.
  #focused() {
    if (this.output.matches(":focus-visible") && this.#active < 0 && !this.#details.isClosing) this.#activate(0);
  }

  #key(event) {
    const last = this.#tokens.length - 1;
    if (last < 0) return;
    if (event.key === "Escape" && this.#active >= 0) {
      event.stopPropagation();
      this.leave();
      return;
    }
    if (event.key === "Enter" && this.#active >= 0) {
      event.preventDefault();
      this.#details.focus();
      return;
    }
    const at = this.#active;
    const steps = { ArrowRight: () => at + 1, ArrowLeft: () => at - 1, Home: () => 0, End: () => last };
    Object.assign(steps, { ArrowDown: () => this.#line(1), ArrowUp: () => this.#line(-1) });
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.#activate(Math.min(Math.max(steps[event.key](), 0), last));
  }

  // The token of the next line in `direction` that is nearest to the selected one; the selected one if there is none.
  #line(direction) {
    const boxes = [...this.output.children].map((one) => one.getClientRects()[0] ?? one.getBoundingClientRect());
    const here = boxes[Math.max(this.#active, 0)];
    const beyond = boxes.filter((box) => direction * (box.top - here.top) > here.height / 2);
    if (!beyond.length) return this.#active;
    const tops = beyond.map((box) => box.top);
    const top = direction > 0 ? Math.min(...tops) : Math.max(...tops);
    const distance = (box) => Math.abs(box.left - here.left);
    const line = beyond.filter((box) => Math.abs(box.top - top) < here.height / 2);
    return boxes.indexOf(line.reduce((best, box) => (distance(box) < distance(best) ? box : best)));
  }

  #activate(index) {
    this.output.children[this.#active]?.classList.remove("active");
    this.#active = index < this.#tokens.length ? index : -1;
    this.output.children[this.#active]?.classList.add("active");
    const token = this.#tokens[this.#active];
    if (!token) {
      this.#details.close(this);
      return;
    }
    this.#details.show(this, this.#active, true);
    this.#details.announce(`Token ${index + 1}: ${visible(alone(token))}, ${percent(token.logprob)}`);
  }

  #hover(index) {
    if (index >= 0) this.#details.show(this, index, index === this.#active);
    else this.#details.close(this);
  }
}
