// One answer with all that is known of it: text or tokens, trajectory, how a vote or an exchange went, and its numbers.

import { html, useState } from "./vendor/htm-preact.standalone.module.js";
import { costOf, tokensPerSecond, useAnswer } from "./answer.js";
import { CopyButton } from "./copying.js";
import { markdown } from "./markdown.js";
import { asCurl, asPython } from "./snippets.js";
import { Legend, MODES, TokenView } from "./tokenview.js";
import { Trace } from "./trace.js";
import { Trajectory } from "./trajectory.js";
import { number, plural } from "./words.js";

const READING = { text: "Text", ...MODES };

/**
 * `children`: buttons that belong to where the answer stands. `hidesNames`: nothing tells which model it was.
 * `showsTrace`: how it came to be is open from the beginning.
 */
export function AnswerView({ answer, isRaw, hidesNames, showsTrace, onBranch, children }) {
  useAnswer(answer);
  const [wanted, setMode] = useState("driver");
  const [pointed, point] = useState(null);
  const hasTokens = answer.tokens.length > 0 && !hidesNames;
  const hasViews = hasTokens && Boolean(answer.tokens[0].members ?? answer.tokens.at(-1).members);
  const mode = hasTokens ? wanted : "text";
  const rate = tokensPerSecond(answer);
  return html`<article class="answer ${answer.isLive ? "is-live" : ""}" aria-busy=${answer.isLive}>
    ${answer.reasoning && !answer.ensemble?.trace && html`<div class="reasoning"><h4>So far</h4><div class="prose">${markdown(answer.reasoning)}</div></div>`}
    ${hasTokens && html`<div class="row reading">
      <label>Colour <select value=${mode} onChange=${(event) => { setMode(event.target.value); point(null); }}>
        ${Object.entries(READING).map(([name, title]) => html`<option value=${name}>${title}</option>`)}</select></label>
      ${mode !== "text" && html`<${Legend} tokens=${answer.tokens} />`}
    </div>`}
    ${mode === "text"
      ? html`<div class=${isRaw ? "raw" : "prose"}>${isRaw ? answer.text : markdown(answer.text)}</div>`
      : html`<${TokenView} answer=${answer} mode=${mode} pointed=${pointed} onPoint=${point} onBranch=${onBranch} />`}
    ${answer.isLive && !answer.text && !answer.reasoning && html`<p class="quiet waiting">Waiting for the first word …</p>`}
    ${answer.error && html`<p class="error" role="alert">${answer.error}</p>`}
    <footer class="row">
      <span class="quiet numbers">${[
        answer.branchedAt !== undefined && `branched at token ${answer.branchedAt + 1}`,
        answer.isStopped && "stopped",
        answer.finish === "length" && "cut at the most tokens",
        answer.usage && plural(answer.usage.completion_tokens, "token"),
        rate && `${number(rate, 1)} tokens/s`,
        answer.ensemble && answer.ensemble.members.length > 1 && !hidesNames &&
          `${answer.ensemble.turnout} of ${answer.ensemble.members.length} members answered`,
        costOf(answer).cost > 0 && `cost ${number(costOf(answer).cost, 5)}`,
      ].filter(Boolean).join(" · ")}</span>
      ${children}
    </footer>
    ${!answer.isLive && !hidesNames && html`<div class="details">
      ${hasViews && html`<${Fold} title="Trajectory">${() => html`<${Trajectory} answer=${answer} pointed=${pointed} onPoint=${point} />`}<//>`}
      ${answer.ensemble?.trace && !answer.ensemble.trace.weights && html`<${Fold} title="How it came to be" startsOpen=${showsTrace}>${() =>
        html`<${Trace} ensemble=${answer.ensemble} />`}<//>`}
      ${answer.ensemble && html`<${Fold} title="Numbers">${() => html`<${Usage} answer=${answer} />`}<//>`}
      <${Fold} title="As code">${() => html`<div class="row">
        <${CopyButton} label="Copy as curl" text=${() => asCurl(answer.request)} />
        <${CopyButton} label="Copy as Python" text=${() => asPython(answer.request)} /></div>`}<//>
    </div>`}
  </article>`;
}

/** Its content is made when it is opened. */
function Fold({ title, startsOpen = false, children }) {
  const [isOpen, open] = useState(startsOpen);
  return html`<details open=${isOpen} onToggle=${(event) => event.target === event.currentTarget && open(event.target.open)}>
    <summary>${title}</summary>${isOpen && children()}</details>`;
}

function Usage({ answer }) {
  const { usage, method } = answer.ensemble;
  const seconds = (answer.endedAt - answer.startedAt) / 1000;
  const first = answer.firstAt === null ? null : (answer.firstAt - answer.startedAt) / 1000;
  return html`<p class="quiet">${method}; ${number(seconds, 2)} s in all${first !== null && `, ${number(first, 2)} s to the first token`}.</p>
    <div class="scroll" tabindex="0" role="region" aria-label="Tokens of each member"><table><thead><tr><th scope="col">member</th><th scope="col">read</th><th scope="col">wrote</th><th scope="col">cost</th></tr></thead>
      <tbody>${Object.entries(usage).map(([name, used]) => html`<tr key=${name}><th scope="row">${name}</th>
        <td>${number(used.prompt_tokens, 0)}</td><td>${number(used.completion_tokens, 0)}</td>
        <td>${used.cost === undefined ? "–" : number(used.cost, 5)}</td></tr>`)}</tbody></table></div>`;
}
