// Small helpers that several parts of the page share.

export const byId = (id) => document.getElementById(id);

export function element(name, properties = {}, children = []) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// A button that keeps its focus while it has no effect, unlike a disabled one.
export function enable(button, isEnabled) {
  button.setAttribute("aria-disabled", String(!isEnabled));
}

export function isEnabled(button) {
  return button.getAttribute("aria-disabled") !== "true";
}

export function onPress(button, act) {
  button.addEventListener("click", () => isEnabled(button) && act());
}

export function visible(text) {
  return text === "" ? "∅" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

// Three digits, as in 12.3, 3.00 or 0.0123.
export function short(number) {
  const text = number.toPrecision(3);
  const rounded = Number(text);
  const size = Math.abs(rounded);
  if (rounded === 0 || size >= 1000) {
    return String(rounded);
  }
  return size >= 1e-4 ? text : rounded.toExponential(2);
}

export function percent(logprob) {
  return `${short(100 * Math.exp(logprob))} %`;
}
