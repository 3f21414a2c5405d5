// The prompt as a part of the text: its line breaks and the keys that send it.

import { byId } from "./elements.js";
import { mode } from "./form.js";

// Whether Enter sends: in chat, where there is a keyboard beside the screen.
export function sends(event) {
  if (event.key !== "Enter" || event.isComposing) return false;
  if (event.ctrlKey || event.metaKey) return true;
  const inChat = event.target === byId("prompt") && mode() === "chat" && matchMedia("(pointer: fine)").matches;
  return inChat && !event.shiftKey;
}

// browsers add a second line break at the end of a text, which would be part of the prompt
byId("prompt").addEventListener("beforeinput", (event) => {
  if (!["insertParagraph", "insertLineBreak"].includes(event.inputType)) return;
  event.preventDefault();
  const range = getSelection().getRangeAt(0);
  range.deleteContents();
  range.insertNode(document.createTextNode("\n"));
  range.collapse(false);
  byId("prompt").dispatchEvent(new Event("input", { bubbles: true }));
});
// a press on the free space beside the text goes to its prompt
byId("sheet").addEventListener("click", (event) => event.target === byId("sheet") && byId("prompt").focus());
