// An exchange by rounds: a column for each participant, a row for each round, and arrows from whom it heard.

import { html } from "./vendor/htm-preact.standalone.module.js";
import { MAX_COLOURS } from "./drivers.js";
import { number } from "./words.js";

const REASONS = {
  unanimity: "all agreed", majority: "more than half agreed", all_left: "nobody had anything new to say",
  max_rounds: "the most rounds were reached", token_budget: "the tokens were used up", time_budget: "the time was used up",
};

/** `transcript`: {settings, rounds, states}, as an exchange's trace has it and `ensemble replay` reads it. */
export function ExchangeReport({ transcript: { settings, rounds, states } }) {
  const names = settings.participants.map((participant) => participant.name);
  const last = states.at(-1);
  return html`<div class="exchange">
    <p>${settings.topology ?? "a map of its own"}: ${last.stop ? `stopped because ${REASONS[last.stop] ?? last.stop}` : "not over yet"};
      the answer is <b>${last.answer ?? "none"}</b>, in the words of ${last.spokesperson}.</p>
    <div class="scroll" tabindex="0" role="region" aria-label="The exchange, round by round"><table class="rounds">
      <thead><tr><th scope="col">round</th>${settings.participants.map((participant, k) => html`<th scope="col" key=${participant.name}>
        <span class="swatch member${k % MAX_COLOURS}"></span> ${participant.name}
        ${participant.model !== participant.name && html` <span class="quiet">${participant.model}</span>`}</th>`)}</tr></thead>
      <tbody>${rounds.map((round, index) => [
        index > 0 && html`<tr class="arrows" aria-hidden="true"><td></td><td colspan=${names.length}>
          <${Arrows} names=${names} hears=${settings.hears} round=${round} /></td></tr>`,
        html`<tr key=${index}><th scope="row">${index}</th>${names.map((name) => html`<td key=${name} data-name=${name}>
          <${Said} name=${name} round=${round} state=${states[index]} heard=${index > 0 ? settings.hears[name] ?? [] : []}
            isFinal=${index === rounds.length - 1 && last.spokesperson === name} /></td>`)}</tr>`,
      ])}</tbody></table></div>
  </div>`;
}

function Said({ name, round, state, heard, isFinal }) {
  const reply = round.replies[name];
  if (!reply) return html`<p class="quiet">${round.silent[name] ? `silent: ${round.silent[name]}` : "has left"}</p>`;
  return html`<p class="facts"><b data-answer=${name}>${reply.answer ?? "no answer"}</b>
      <span data-confidence=${name}>confidence ${number(state.confidence[name] ?? 0, 2)}</span> ${isFinal && html`<span class="mark">★ final</span>`}</p>
    ${heard.length > 0 && html`<p class="quiet">heard ${heard.join(", ")}</p>`}
    <details><summary>${shortened(reply.text)}</summary><div class="raw">${reply.text}</div></details>`;
}

const shortened = (text) => (text.trim().length > 80 ? `${text.trim().slice(0, 80)} …` : text.trim() || "(empty)");

function Arrows({ names, hears, round }) {
  const x = (name) => (100 * (names.indexOf(name) + 0.5)) / names.length;
  const lines = names.filter((name) => round.replies[name]).flatMap((name) => (hears[name] ?? []).map((other) => [other, name]));
  return html`<svg viewBox="0 0 100 30" preserveAspectRatio="none">${lines.map(([from, to]) => html`<g class="arrow member${names.indexOf(from) % MAX_COLOURS}">
    <line x1=${x(from)} y1="1" x2=${x(to)} y2="24" /><path d="M ${x(to) - 1} 23 L ${x(to)} 29 L ${x(to) + 1} 23 Z" /></g>`)}</svg>`;
}
