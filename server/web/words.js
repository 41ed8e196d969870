// Numbers and texts as people read them.

/** 0.12345 → "0.123"; a small one keeps two digits that say something: 0.0000123 → "1.2e-5". */
export function number(value, digits = 2) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value !== 0 && Math.abs(value) < 10 ** -digits / 2 && digits > 0) return value.toExponential(1);
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** 0.1234 → "12.3 %" */
export const percent = (part) =>
  part > 0 && part < 0.0005 ? "<0.1 %" : `${number(100 * part, 1)} %`;

/** A token's text with its white space to be seen: "\n" → ⏎, " a" → ␣a */
export const quoted = (text) => (text === "" ? "∅" : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣"));

export const bytes = (count) =>
  count < 1024 ? `${count} B` : count < 1024 ** 2 ? `${number(count / 1024, 1)} kB` : `${number(count / 1024 ** 2, 1)} MB`;

/** Seconds since 1970 → local time. */
export const time = (seconds) => (seconds ? new Date(1000 * seconds).toLocaleString() : "–");

export const plural = (count, word) => `${number(count, 0)} ${word}${count === 1 ? "" : "s"}`;

/** The sentences that `text` has completed after its first `from` characters: [sentences, where the next one begins]. */
export function sentences(text, from) {
  const found = /^[\s\S]*[.!?…:\n](?=\s|$)/.exec(text.slice(from));
  return found ? [found[0].trim(), from + found[0].length] : ["", from];
}
