// What two texts have in common, word by word: a longest common subsequence.

const MAX_CELLS = 4_000_000; // above that the middle is shown as replaced: the table would not fit

/** [[kind, text], …] with kind "same", "left" (only in the first text) or "right" (only in the second). */
export function wordDiff(left, right) {
  const a = left.match(/\s+|[^\s]+/g) ?? [];
  const b = right.match(/\s+|[^\s]+/g) ?? [];
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a.at(-1 - end) === b.at(-1 - end)) end += 1;
  const middle = between(a.slice(start, a.length - end), b.slice(start, b.length - end));
  const all = [["same", a.slice(0, start).join("")], ...middle, ["same", a.slice(a.length - end).join("")]];
  return joined(all.filter(([, text]) => text));
}

function between(a, b) {
  if (a.length * b.length > MAX_CELLS) return [["left", a.join("")], ["right", b.join("")]];
  const width = b.length + 1;
  const table = new Uint16Array((a.length + 1) * width); // [i, j]: the longest common part of a[i:] and b[j:]
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      const at = i * width + j;
      table[at] = a[i] === b[j] ? table[at + width + 1] + 1 : Math.max(table[at + width], table[at + 1]);
    }
  }
  const parts = [];
  let [i, j] = [0, 0];
  while (i < a.length && j < b.length) {
    if (a[i] === b[j]) {
      parts.push(["same", a[i]]);
      i += 1;
      j += 1;
    } else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) parts.push(["left", a[i++]]);
    else parts.push(["right", b[j++]]);
  }
  return [...parts, ["left", a.slice(i).join("")], ["right", b.slice(j).join("")]];
}

function joined(parts) {
  const out = [];
  for (const [kind, text] of parts) {
    if (out.at(-1)?.[0] === kind) out.at(-1)[1] += text;
    else out.push([kind, text]);
  }
  return out;
}
