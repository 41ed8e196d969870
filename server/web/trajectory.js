// Whom the ensemble trusted, token by token: the members' weights, or the share of each token that they drove.

import { html, useMemo, useState } from "./vendor/htm-preact.standalone.module.js";
import { download } from "./api.js";
import { Lines, TableTwin } from "./charts.js";
import { shares } from "./drivers.js";
import { number, quoted } from "./words.js";

export function Trajectory({ answer, pointed, onPoint }) {
  const tokens = answer.tokens;
  const [what, show] = useState(() => (hasMovingWeights(tokens) ? "weight" : "share"));
  const names = Object.keys(tokens.find((token) => token.members)?.members ?? {});
  const places = useMemo(() => tokens.map((_, index) => index + 1), [answer, tokens.length]);
  const series = useMemo(() => names.map((name, k) => ({
    label: name,
    values: tokens.map((token) => (!token.members ? null : what === "weight" ? token.members[name]?.weight : shares(token)[k])),
  })), [answer, tokens.length, what]);
  if (names.length < 2) return null;
  const values = series.flatMap((one) => one.values).filter((value) => value !== null);
  const range = [Math.min(0, ...bounds(values)), Math.max(1, ...bounds(values))];
  const evidence = answer.ensemble?.trace?.weights;
  return html`<section class="trajectory" aria-label="Trajectory">
    <header class="row">
      <label>Show <select value=${what} onChange=${(event) => show(event.target.value)}>
        <option value="weight">weights</option><option value="share">share of each token</option></select></label>
      <button type="button" onClick=${() => download("trajectory.csv", csv(tokens, names), "text/csv")}>CSV</button>
    </header>
    ${evidence && html`<p class="quiet">Before the prompt ${listed(evidence.prior)}; after the prompt ${listed(evidence.after_prompt)}.</p>`}
    <${Lines} places=${places} series=${series} range=${range} at=${pointed === null ? null : pointed + 1}
      onPoint=${(index) => onPoint(index)} />
    <${TableTwin} title="The same as a table" head=${["token", "text", ...names]}
      rows=${() => tokens.map((token, index) => [index + 1, quoted(token.token), ...series.map((one) => number(one.values[index], 4))])} />
  </section>`;
}

/** Only a posterior pool moves them; elsewhere the shares say more. */
const hasMovingWeights = (tokens) => new Set(tokens.map((token) => JSON.stringify(
  Object.values(token.members ?? {}).map((view) => view.weight.toFixed(3))))).size > 1;

const bounds = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [0, 0]);

const listed = (weights) => Object.entries(weights).map(([name, weight]) => `${name} ${number(weight, 2)}`).join(", ");

/** One line per token: its place, text, log-probability, and each member's log-probability, weight and share. */
export function csv(tokens, names) {
  const cell = (value) => {
    let text = String(value ?? "");
    if (/^[=+\-@\t\r]/.test(text) && typeof value !== "number") text = `'${text}`; // a spreadsheet would run it
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const head = ["token", "text", "logprob", ...names.flatMap((name) => [`${name} logprob`, `${name} weight`, `${name} share`])];
  const lines = tokens.map((token, index) => {
    const parts = shares(token);
    const views = names.flatMap((name, k) => [token.members?.[name]?.logprob, token.members?.[name]?.weight, parts?.[k]]);
    return [index + 1, token.token, token.logprob, ...views];
  });
  return [head, ...lines].map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
}
