// Settings and history: one of them is open beside the text, or neither.

import { byId, onPress } from "./elements.js";

export function openDrawer(id, isOpen = true) {
  for (const one of ["settings", "history"]) {
    const open = one === id && isOpen;
    byId(one).hidden = !open;
    byId(`${one}-button`).setAttribute("aria-expanded", String(open));
  }
  if (isOpen) byId(id).querySelector("textarea:not([hidden] *), input, button.entry, button")?.focus();
  else byId(`${id}-button`).focus();
}

for (const id of ["settings", "history"]) onPress(byId(`${id}-button`), () => openDrawer(id, byId(id).hidden));
for (const button of document.querySelectorAll(".close")) onPress(button, () => openDrawer(button.dataset.for, false));
