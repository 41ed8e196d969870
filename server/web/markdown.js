// A small part of Markdown as elements whose text is text: nothing that a model writes becomes HTML, a link or an image.

import { h } from "./vendor/htm-preact.standalone.module.js";

const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*|\*[^*\s][^*\n]*\*)/;

function inline(text) {
  return text.split(INLINE).map((part, index) => {
    if (index % 2 === 0) return part;
    if (part.startsWith("`")) return h("code", null, part.slice(1, -1));
    return part.startsWith("**") ? h("strong", null, part.slice(2, -2)) : h("em", null, part.slice(1, -1));
  });
}

const KINDS = [
  ["heading", /^(#{1,6})\s+(.*)$/],
  ["item", /^\s*[-*+]\s+(.*)$/],
  ["number", /^\s*\d+[.)]\s+(.*)$/],
  ["quote", /^>\s?(.*)$/],
];

/** Headings, lists, quotes, code and emphasis; everything else is shown as it was written. */
export function markdown(text) {
  const blocks = [];
  let open = null; // the block that the next line may continue
  for (const line of text.split("\n")) {
    const fence = /^\s*(```|~~~)/.exec(line)?.[1];
    if (open?.kind === "code") {
      if (fence === open.fence) open = null;
      else open.lines.push(line);
      continue;
    }
    const [kind, match] = fence ? ["code"] : kindOf(line);
    if (kind === "blank") open = null;
    else if (open?.kind === kind && kind !== "heading") open.lines.push(match ? match.at(-1) : line);
    else {
      open = { kind, fence, level: match?.[1].length, lines: fence ? [] : [match ? match.at(-1) : line] };
      blocks.push(open);
    }
  }
  return blocks.map(element);
}

function kindOf(line) {
  if (!line.trim()) return ["blank"];
  for (const [kind, pattern] of KINDS) {
    const match = pattern.exec(line);
    if (match) return [kind, match];
  }
  return ["paragraph"];
}

function element({ kind, level, lines }) {
  switch (kind) {
    case "code": return h("pre", { tabIndex: 0 }, h("code", null, lines.join("\n")));
    case "heading": return h("p", { class: `heading level${level}` }, h("strong", null, inline(lines[0])));
    case "item": return h("ul", null, lines.map((line) => h("li", null, inline(line))));
    case "number": return h("ol", null, lines.map((line) => h("li", null, inline(line))));
    case "quote": return h("blockquote", null, inline(lines.join("\n")));
    default: return h("p", null, inline(lines.join("\n")));
  }
}
