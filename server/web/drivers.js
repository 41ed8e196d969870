// Which member drove a token: the shares w_k p_k / Σ_j w_j p_j, and how members are told apart without colour alone.

export const MAX_COLOURS = 8; // Okabe and Ito's palette; from the ninth member on colours repeat and initials differ

/** Each member's share of the token's probability, in the members' order; null for a token without their views. */
export function shares(token) {
  if (!token.members) return null;
  const views = Object.values(token.members);
  // relative to the best, so that a token which all find unlikely has shares too; a negative weight drives nothing
  const best = Math.max(...views.filter((view) => view.weight > 0).map((view) => view.logprob));
  const parts = views.map((view) => Math.max(view.weight, 0) * Math.exp(view.logprob - best));
  const sum = parts.reduce((total, part) => total + part, 0);
  return sum > 0 ? parts.map((part) => part / sum) : parts.map(() => 0);
}

/** {index, name, share} of the member with the largest share; the first of equals. */
export function driver(token) {
  const found = shares(token);
  if (!found) return null;
  const index = found.indexOf(Math.max(...found));
  return { index, name: Object.keys(token.members)[index], share: found[index] };
}

/** How strongly a token is shaded, 0 to 1, in each mode of the token view. */
export const STRENGTH = {
  driver: (token) => driver(token)?.share ?? 0,
  probability: (token) => 1 - Math.exp(token.logprob ?? 0),
  entropy: (token) => Math.min(1, (token.entropy ?? 0) / 4), // 4 nats: as open as a choice among 55 words
  disagreement: (token) => disagreement(token),
};

/** The Jensen-Shannon divergence as a part of its largest value, ln K. */
export function disagreement(token) {
  const count = Object.keys(token.members ?? {}).length;
  return count > 1 ? Math.min(1, (token.disagreement ?? 0) / Math.log(count)) : 0;
}

/** The shortest beginnings that tell the names apart: {code: "C", crowd: "CR"}; a number where none does. */
export function initials(names) {
  const found = {};
  names.forEach((name, index) => {
    const others = names.filter((other) => other !== name);
    const differs = (length) => others.every((other) => other.slice(0, length).toUpperCase() !== cut(length));
    const cut = (length) => name.slice(0, length).toUpperCase();
    const length = [1, 2, 3].find(differs);
    found[name] = length ? cut(length) : String(index + 1);
  });
  return found;
}

/** Each member's part of all tokens that it drove: the sum of its shares over the number of tokens. */
export function totals(tokens) {
  const sums = {};
  for (const token of tokens) {
    const found = shares(token);
    if (found) Object.keys(token.members).forEach((name, index) => (sums[name] = (sums[name] ?? 0) + found[index]));
  }
  const all = Object.values(sums).reduce((total, sum) => total + sum, 0);
  return Object.fromEntries(Object.entries(sums).map(([name, sum]) => [name, all ? sum / all : 0]));
}
