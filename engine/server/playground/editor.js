// The prompt as a part of the text: its line breaks and the keys that send it.

import { byId } from "./elements.js";
import { LAST_LINE, mode } from "./form.js";

// Whether Enter sends: in chat, where there is a keyboard beside the screen.
export function sends(event) {
  if (event.key !== "Enter" || event.isComposing) return false;
  if (event.ctrlKey || event.metaKey) return true;
  const inChat = event.target === byId("prompt") && mode() === "chat" && matchMedia("(pointer: fine)").matches;
  return inChat && !event.shiftKey;
}

// Browsers show the caret in an empty last line only if something follows there; a line break of their own would be
// part of the prompt, so this is a space without width, which form.js takes off.
byId("prompt").addEventListener("beforeinput", (event) => {
  if (!["insertParagraph", "insertLineBreak"].includes(event.inputType)) return;
  event.preventDefault();
  const range = getSelection().getRangeAt(0);
  const line = document.createTextNode("\n");
  range.deleteContents();
  range.insertNode(line);
  range.setStartAfter(line);
  range.collapse(true);
  if (!byId("prompt").textContent.endsWith(LAST_LINE)) byId("prompt").append(LAST_LINE);
  byId("prompt").normalize();
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  byId("prompt").dispatchEvent(new Event("input", { bubbles: true }));
});
// a press on the free space beside the text goes to its prompt
byId("sheet").addEventListener("click", (event) => event.target === byId("sheet") && byId("prompt").focus());
