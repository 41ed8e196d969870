// What is known of one token: each member's view of it, the mixture's, and what else might have come.

import { html, useLayoutEffect, useRef, useState } from "./vendor/htm-preact.standalone.module.js";
import { Bar } from "./charts.js";
import { MAX_COLOURS, shares } from "./drivers.js";
import { number, percent, quoted } from "./words.js";

const MARGIN = 8; // px

export function TokenCard({ token, index, spot, width, isPinned, onClose, onBranch }) {
  const card = useRef(null);
  const [left, setLeft] = useState(spot.left);
  useLayoutEffect(() => {
    setLeft(Math.max(0, Math.min(spot.left, width - card.current.offsetWidth - MARGIN)));
  }, [spot, width]);
  const names = Object.keys(token.members ?? {});
  const parts = shares(token) ?? [];
  return html`<div class="card" ref=${card} role="region" aria-label="Token ${index + 1}"
      style=${{ top: `${spot.top}px`, left: `${left}px` }}>
    <header>
      <code>${quoted(token.token)}</code> <span class="quiet">token ${index + 1}</span>
      ${isPinned && html`<button type="button" class="plain" onClick=${onClose} aria-label="Close the card">✕</button>`}
    </header>
    ${token.isChosen && html`<p class="quiet">You chose this token; it was not sampled.</p>`}
    <dl class="facts">
      ${token.logprob != null && html`<div><dt>p</dt><dd data-value="p">${percent(Math.exp(token.logprob))}</dd></div>`}
      ${token.entropy != null && html`<div><dt>entropy</dt><dd data-value="entropy">${number(token.entropy, 3)} nats</dd></div>`}
      ${token.disagreement != null && html`<div><dt>disagreement</dt>
        <dd data-value="disagreement">${number(token.disagreement, 4)} nats</dd></div>`}
    </dl>
    ${names.length > 0 && html`<table class="views">
      <thead><tr><th scope="col">member</th><th scope="col">p</th><th scope="col">weight</th><th scope="col">drove</th></tr></thead>
      <tbody>${names.map((name, k) => html`<tr key=${name} data-member=${name}>
        <th scope="row"><span class="swatch member${k % MAX_COLOURS}"></span> ${name}</th>
        <td data-value="p">${percent(Math.exp(token.members[name].logprob))}</td>
        <td data-value="weight">${number(token.members[name].weight, 3)}</td>
        <td data-value="share"><${Bar} part=${parts[k]} colour=${k} /> ${percent(parts[k])}</td>
      </tr>`)}</tbody>
    </table>`}
    ${token.top_logprobs.length > 0 && html`<${Alternatives} title="What else might have come" tokens=${token.top_logprobs}
      chosen=${token.token_id} onBranch=${onBranch} />`}
    ${names.length > 1 && names.some((name) => token.members[name].top?.length) && html`<details>
      <summary>Each member's own best</summary>
      <table class="views"><tbody>${names.map((name) => html`<tr key=${name}><th scope="row">${name}</th>
        <td>${(token.members[name].top ?? []).map((one) =>
          html`<span class="own"><code>${quoted(one.token)}</code> ${percent(Math.exp(one.logprob))}</span> `)}</td></tr>`)}
      </tbody></table>
    </details>`}
  </div>`;
}

function Alternatives({ title, tokens, chosen, onBranch }) {
  return html`<div class="alternatives">
    <h4>${title}</h4>
    <ul>${tokens.map((one) => {
      const label = html`<code>${quoted(one.token)}</code> <span class="quiet">${percent(Math.exp(one.logprob))}</span>`;
      const canBranch = onBranch && one.token_id !== undefined && one.token_id !== chosen;
      return html`<li key=${one.token_id}>${canBranch
        ? html`<button type="button" title="Go on from here with this token" onClick=${() => onBranch(one)}>${label}</button>`
        : html`<span class=${one.token_id === chosen ? "is-chosen" : ""}>${label}${one.token_id === chosen && " ✓"}</span>`}</li>`;
    })}</ul>
  </div>`;
}
