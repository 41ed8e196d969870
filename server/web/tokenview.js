// The tokens of an answer, a span each. Written into the page by hand: thousands of tokens arrive one by one, and each
// must cost the same. They are one group for the keyboard: Tab enters it, arrows walk, Enter pins the card, Esc closes.

import { html, useEffect, useLayoutEffect, useRef, useState } from "./vendor/htm-preact.standalone.module.js";
import { TokenCard } from "./tokencard.js";
import { MAX_COLOURS, STRENGTH, disagreement, driver, initials, totals } from "./drivers.js";
import { number } from "./words.js";

export const MODES = { driver: "Driver", probability: "Improbable", entropy: "Entropy", disagreement: "Disagreement" };
const LEAST_APART = 0.02; // of the most that members can disagree: below it nothing is underlined
const NAMES = { " ": "space", "\n": "line break", "\t": "tab", "": "part of a character" };

/**
 * `onPoint(index | null)`: the token that is looked at; `pointed`: the same, as set from elsewhere (a chart).
 * `onBranch(index, alternative)`: go on from there with another token; null where that cannot be done.
 */
export function TokenView({ answer, mode, pointed, onPoint, onBranch }) {
  const group = useRef(null);
  const view = useRef(null);
  const [isPinned, pin] = useState(false);
  const [spot, setSpot] = useState(null); // where the card stands
  view.current ??= new Spans();
  useLayoutEffect(() => view.current.draw(group.current, answer, mode), [answer, answer.version, mode]);
  useEffect(() => view.current.mark(pointed), [pointed, answer]);

  const point = (span) => {
    if (!span) return;
    setSpot({ top: span.offsetTop + span.offsetHeight, left: span.offsetLeft });
    onPoint(Number(span.dataset.index));
  };
  const close = () => {
    pin(false);
    setSpot(null);
    onPoint(null);
  };
  useEffect(() => {
    if (!spot) return undefined;
    const typed = (event) => event.key === "Escape" && close(); // wherever the focus is
    addEventListener("keydown", typed);
    return () => removeEventListener("keydown", typed);
  }, [spot]);
  const walk = (event) => {
    const at = Number(event.target.dataset.index ?? 0);
    const last = answer.tokens.length - 1;
    const to = { ArrowRight: at + 1, ArrowDown: at + 10, ArrowLeft: at - 1, ArrowUp: at - 10, Home: 0, End: last }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      view.current.focus(Math.max(0, Math.min(last, to)));
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      point(event.target.closest("[data-index]"));
      pin(true);
    }
  };
  const token = pointed === null ? null : answer.tokens[pointed];
  return html`<div class="tokenview" onMouseLeave=${() => !isPinned && !group.current.contains(document.activeElement) && close()}>
    <div class="tokens mode-${mode}" ref=${group} role="listbox" aria-label="Tokens of the answer" tabindex="-1"
      onMouseOver=${(event) => !isPinned && point(event.target.closest("[data-index]"))}
      onFocusIn=${(event) => point(event.target.closest("[data-index]"))}
      onClick=${(event) => {
        const span = event.target.closest("[data-index]");
        if (!span) return;
        view.current.focus(Number(span.dataset.index));
        pin(true);
      }}
      onKeyDown=${walk}></div>
    ${token && spot && html`<${TokenCard} token=${token} index=${pointed} spot=${spot} isPinned=${isPinned}
      width=${group.current.clientWidth} onClose=${close}
      onBranch=${onBranch && !answer.isLive ? (alternative) => { close(); onBranch(pointed, alternative); } : null} />`}
  </div>`;
}

/** The spans of one answer; only what is new or has another mode is touched. */
class Spans {
  answer = null;
  current = 0; // the token that Tab enters

  draw(group, answer, mode) {
    if (this.answer !== answer) {
      group.replaceChildren();
      this.spans = [];
      this.decoder = new TextDecoder();
      this.lastDriver = null;
      this.current = 0;
    } else if (this.mode !== mode) this.spans.forEach((span, index) => this.shade(span, answer.tokens[index], mode));
    this.answer = answer;
    this.mode = mode;
    const added = document.createDocumentFragment();
    for (let index = this.spans.length; index < answer.tokens.length; index += 1) {
      const span = this.span(answer.tokens[index], index);
      this.shade(span, answer.tokens[index], mode);
      this.spans.push(span);
      added.append(span);
    }
    group.append(added);
  }

  span(token, index) {
    const span = document.createElement("span");
    // a character may be spread over tokens: it stands in the one that completes it
    const text = this.decoder.decode(Uint8Array.from(token.bytes), { stream: true });
    span.textContent = text;
    span.dataset.index = index;
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    if (!text.trim()) span.setAttribute("aria-label", NAMES[text] ?? "white space");
    if (!text) span.dataset.bytes = token.bytes.map((byte) => byte.toString(16)).join(" ") || "∅";
    span.tabIndex = index === this.current ? 0 : -1;
    if (token.isChosen) span.classList.add("chosen");
    const found = driver(token);
    if (found) {
      span.classList.add(`member${found.index % MAX_COLOURS}`);
      if (found.name !== this.lastDriver && Object.keys(token.members).length > 1) {
        this.initials ??= initials(Object.keys(token.members));
        span.dataset.initial = this.initials[found.name] ?? initials(Object.keys(token.members))[found.name];
      }
      this.lastDriver = found.name;
    }
    return span;
  }

  shade(span, token, mode) {
    span.style.setProperty("--strength", STRENGTH[mode](token).toFixed(3));
    const apart = disagreement(token);
    span.classList.toggle("apart", apart > LEAST_APART);
    span.style.setProperty("--apart", `${(1 + 3 * apart).toFixed(2)}px`);
  }

  mark(index) {
    this.marked?.setAttribute("aria-selected", "false");
    this.marked = this.spans[index ?? -1];
    this.marked?.setAttribute("aria-selected", "true");
  }

  focus(index) {
    if (!this.spans[index]) return;
    if (this.spans[this.current]) this.spans[this.current].tabIndex = -1;
    this.current = index;
    this.spans[index].tabIndex = 0;
    this.spans[index].focus();
  }
}

/** Who is who: colour, initial and name of each member, and what part of the answer it drove. */
export function Legend({ tokens }) {
  const names = Object.keys(tokens[0]?.members ?? {});
  if (names.length < 2) return null;
  const letters = initials(names);
  const parts = totals(tokens);
  return html`<ul class="legend" aria-label="Members, and the part of the answer that each drove">
    ${names.map((name, index) => html`<li key=${name}><span class="swatch member${index % MAX_COLOURS}">${letters[name]}</span>
      ${name} <span class="quiet">${number(100 * parts[name], 0)} %</span></li>`)}
  </ul>`;
}
