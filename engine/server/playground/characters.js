// From tokens to characters: a token may hold part of a character, which is shown once it is complete.

const NAME = /^bytes:(?:\\x[0-9a-f]{2}|[^\\])+$/;
const PART = /\\x([0-9a-f]{2})|([^\\])/gu;
const UTF8 = new TextEncoder();

// The bytes of a token, from the server's list or from a name such as `bytes:\xe3\x81`.
export function bytesOf(name, listed) {
  if (listed) return Uint8Array.from(listed);
  if (!NAME.test(name) || !name.includes("\\x")) return UTF8.encode(name);
  const parts = [...name.slice("bytes:".length).matchAll(PART)];
  return Uint8Array.from(parts.flatMap(([, hex, character]) => (hex ? [parseInt(hex, 16)] : [...UTF8.encode(character)])));
}

// A single token, for lists: its characters, or its bytes if they are not whole characters.
export function alone(token) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(token.bytes);
  } catch {
    return [...token.bytes].map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  }
}

// The characters of consecutive tokens; a split character comes with the token that completes it.
export class Characters {
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });

  of(token) {
    return this.#decoder.decode(token.bytes, { stream: true });
  }

  // The incomplete character at the end of an output.
  end() {
    return this.#decoder.decode();
  }
}
