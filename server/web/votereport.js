// A vote: how alike any two answers are, what each of them scored, who won, and where two answers differ.

import { html, useState } from "./vendor/htm-preact.standalone.module.js";
import { Bar } from "./charts.js";
import { number } from "./words.js";
import { wordDiff } from "./worddiff.js";

/** `trace`: of crowd_vote, majority, ranking, or a layer of a fusion. Candidates are numbered from 1 here. */
export function VoteReport({ trace }) {
  const [pair, compare] = useState(null);
  const { candidates, silent = [], warnings = [] } = trace;
  return html`<div class="vote">
    ${warnings.map((warning) => html`<p class="warning">${warning}</p>`)}
    ${trace.votes && html`<${Tally} votes=${trace.votes} winner=${trace.answer} />`}
    ${trace.matrix && html`<${Heatmap} trace=${trace} pair=${pair} onPair=${compare} />`}
    ${pair && html`<${Pair} candidates=${candidates} pair=${pair} />`}
    <ol class="candidates">${candidates.map((candidate, index) => html`<${Candidate} key=${index} index=${index}
      candidate=${candidate} trace=${trace} />`)}</ol>
    ${silent.map((one) => html`<p class="quiet">${one.member} was silent: ${one.reason}</p>`)}
  </div>`;
}

const signed = (index) => `${index + 1}`;

function Candidate({ candidate, index, trace }) {
  const scores = trace.scores;
  const best = scores && Math.max(...scores.map(Math.abs), 1e-9);
  const marks = [
    trace.winner === index && "★ winner",
    (trace.outliers ?? []).includes(index) && "outlier",
    ...(trace.ties ?? []).filter((group) => group.includes(index)).map((group) => `tied: ${group.map(signed).join(" = ")}`),
    ...(trace.equal_texts ?? []).filter((group) => group.length > 1 && group.includes(index))
      .map((group) => `same text: ${group.map(signed).join(", ")}`),
  ].filter(Boolean);
  return html`<li class=${trace.winner === index ? "is-winner" : ""}>
    <header class="row"><strong>${candidate.member}</strong> ${candidate.sample > 0 && html`<span class="quiet">sample ${candidate.sample + 1}</span>`}
      ${scores && html`<${Bar} part=${scores[index] / best} /> <span data-score=${index}>${number(scores[index], 3)}</span>`}
      ${candidate.answer !== undefined && html`<span>answer: <b>${candidate.answer ?? "none"}</b></span>`}
      ${marks.map((mark) => html`<span class="mark">${mark}</span>`)}</header>
    <div class="raw">${candidate.text}</div>
  </li>`;
}

/** A table whose cells are shaded: it is its own twin. A click, or Enter, shows the two texts. */
function Heatmap({ trace, pair, onPair }) {
  const [which, choose] = useState("");
  const matrix = which ? trace.similarity[which] : trace.matrix;
  const names = Object.keys(trace.similarity ?? {});
  const flat = matrix.flatMap((row, i) => row.filter((_, j) => i !== j));
  const [low, high] = [Math.min(...flat, 0), Math.max(...flat, 1e-9)];
  const title = (index) => `${signed(index)} ${trace.candidates[index].member}`;
  return html`<figure><figcaption class="row">How alike they are: choose a cell to see both texts.
      ${names.length > 1 && html`<label>Similarity <select value=${which} onChange=${(event) => choose(event.target.value)}>
        <option value="">blend</option>${names.map((name) => html`<option value=${name}>${name}</option>`)}</select></label>`}</figcaption>
    <div class="scroll" tabindex="0" role="region" aria-label="Similarities"><table class="heatmap">
      <thead><tr><td></td>${matrix.map((_, j) => html`<th scope="col" title=${title(j)}>${signed(j)}</th>`)}</tr></thead>
      <tbody>${matrix.map((row, i) => html`<tr key=${i} class=${trace.winner === i ? "is-winner" : ""}><th scope="row">${title(i)}${trace.winner === i && " ★"}</th>
        ${row.map((value, j) => html`<td key=${j} style=${{ "--strength": i === j ? 0 : ((value - low) / (high - low)).toFixed(3) }}>
          ${i === j ? html`<span class="quiet">${number(value, 2)}</span>` : html`<button type="button" data-cell="${i},${j}"
            aria-pressed=${pair?.[0] === i && pair?.[1] === j} aria-label="${title(i)} and ${title(j)}: ${number(value, 2)}"
            onClick=${() => onPair([i, j])}>${number(value, 2)}</button>`}</td>`)}</tr>`)}</tbody>
    </table></div></figure>`;
}

function Pair({ candidates, pair: [i, j] }) {
  const parts = wordDiff(candidates[i].text, candidates[j].text);
  const side = (index, own) => html`<div><h4>${signed(index)} ${candidates[index].member}</h4>
    <p class="raw">${parts.filter(([kind]) => kind === "same" || kind === own).map(([kind, text]) =>
      (kind === "same" ? text : html`<mark class=${own}>${text}</mark>`))}</p></div>`;
  return html`<div class="diff columns" aria-live="polite">${side(i, "left")}${side(j, "right")}</div>`;
}

function Tally({ votes, winner }) {
  const entries = Object.entries(votes);
  const all = entries.reduce((sum, [, weight]) => sum + weight, 0) || 1;
  return html`<table class="views"><thead><tr><th scope="col">answer</th><th scope="col">votes</th></tr></thead>
    <tbody>${entries.map(([answer, weight]) => html`<tr><th scope="row">${answer}${answer === winner && " ★"}</th>
      <td><${Bar} part=${weight / all} /> ${number(weight, 2)}</td></tr>`)}</tbody></table>`;
}
