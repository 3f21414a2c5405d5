// The list of earlier sessions.

import { byId, element } from "./elements.js";
import { path } from "./session.js";

const SHOWN = 80;

function title(session) {
  const text = session.first.prompt.trim().replaceAll(/\s+/g, " ");
  return text.length > SHOWN ? `${text.slice(0, SHOWN)}…` : text || "(empty)";
}

export function showHistory(store, { open, remove }) {
  const rows = store.sessions.map((session) => {
    const turns = path(session).length;
    const about = session.mode === "chat" ? `chat, ${turns} ${turns === 1 ? "turn" : "turns"}` : "completion";
    const name = element("button", { type: "button", className: "entry", dir: "auto" }, [title(session), element("small", { textContent: about })]);
    if (session === store.current) name.setAttribute("aria-current", "true");
    name.addEventListener("click", () => open(session));
    const gone = element("button", { type: "button", className: "small", textContent: "Delete", ariaLabel: `Delete: ${title(session)}` });
    gone.addEventListener("click", () => remove(session));
    return element("li", {}, [name, gone]);
  });
  byId("sessions").replaceChildren(...rows);
}
