// Chat answers as formatted text. marked makes HTML of Markdown; DOMPurify admits these elements only and returns nodes.

import { Marked } from "./vendor/marked.js";
import purify from "./vendor/dompurify.js";

const TAGS = "p br hr h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong del table thead tbody tr th td a".split(" ");

function escaped(text) {
  const names = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
  return text.replace(/[&<>"]/g, (character) => names[character]);
}

// HTML within Markdown is shown as it was written, and an image, which would be loaded from elsewhere, as its text.
const renderer = { html: ({ text }) => escaped(text), image: ({ text }) => escaped(text) };
const marked = new Marked({ renderer, gfm: true, breaks: true, async: false });

purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});

export function formatted(text) {
  const html = marked.parse(text);
  const made = purify.sanitize(html, {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ["href", "start", "align"],
    ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  });
  // wide ones scroll, which the keyboard can do only from within
  for (const wide of made.querySelectorAll("pre, table")) wide.tabIndex = 0;
  return made;
}
