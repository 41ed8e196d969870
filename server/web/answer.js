// One answer while it arrives and after: its text, its tokens with every member's view, and who answered.

import { announce } from "./announcing.js";
import { chunks } from "./api.js";
import { useEffect, useState } from "./vendor/htm-preact.standalone.module.js";
import { sentences } from "./words.js";

/** An answer of which nothing has come yet. `version` grows with every change, and `listeners` are called. */
export function newAnswer(request) {
  return { request, text: "", reasoning: "", tokens: [], tokenIds: [], promptIds: null, ensemble: null, usage: null,
    finish: null, error: null, isLive: true, isStopped: false, startedAt: performance.now(), firstAt: null,
    endedAt: null, version: 0, listeners: new Set(), controller: new AbortController() };
}

/** A copy of `answer` up to token `place`, then `alternative` in its stead: where a branch begins. */
export function branchOf(answer, place, alternative) {
  const tokens = [...answer.tokens.slice(0, place), { ...alternative, top_logprobs: [], isChosen: true }];
  const begun = newAnswer(answer.request);
  return Object.assign(begun, { tokens, tokenIds: [...answer.tokenIds.slice(0, place), alternative.token_id],
    promptIds: answer.promptIds, text: textOf(tokens), branchedAt: place });
}

/** The text of whole tokens, put together from their bytes. */
export const textOf = (tokens) => new TextDecoder().decode(Uint8Array.from(tokens.flatMap((token) => token.bytes)));

/** Asks, and fills `answer` as it comes, until it has ended. `isSpoken`: screen readers hear its sentences. */
export async function ask(answer, { isSpoken = false } = {}) {
  const { path, body } = answer.request;
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  let spoken = answer.text.length;
  try {
    for await (const chunk of chunks(path, streamed, answer.controller.signal)) {
      take(answer, chunk);
      if (isSpoken) {
        const [sentence, next] = sentences(answer.text, spoken);
        if (sentence) announce(sentence);
        spoken = next;
      }
      changed(answer);
    }
    if (isSpoken) announce(answer.text.slice(spoken));
  } catch (error) {
    if (error.name === "AbortError") answer.isStopped = true;
    else answer.error = error.message;
  }
  answer.isLive = false;
  answer.endedAt = performance.now();
  changed(answer);
}

/** Closes the connection, upon which the server stops at its next step. What has come stays. */
export const stop = (answer) => answer.controller.abort();

function changed(answer) {
  answer.version += 1;
  answer.listeners.forEach((listener) => listener());
}

/** Draws the component anew when `answer` has changed, once per frame at most. */
export function useAnswer(answer) {
  const [, redraw] = useState(0);
  useEffect(() => {
    let frame = 0;
    const listener = () => {
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        redraw(answer.version);
      });
    };
    answer.listeners.add(listener);
    listener();
    return () => {
      answer.listeners.delete(listener);
      cancelAnimationFrame(frame);
    };
  }, [answer]);
}

function take(answer, chunk) {
  if (chunk.ensemble) answer.ensemble = chunk.ensemble;
  if (chunk.usage) answer.usage = chunk.usage;
  if (chunk.prompt_token_ids) answer.promptIds ??= chunk.prompt_token_ids;
  for (const choice of chunk.choices) {
    if (choice.index !== 0) continue;
    const piece = choice.delta?.content ?? choice.text ?? "";
    const reasoning = choice.delta?.reasoning_content ?? "";
    const tokens = choice.logprobs?.content ?? [];
    if ((piece || reasoning || tokens.length) && answer.firstAt === null) answer.firstAt = performance.now();
    answer.text += piece;
    answer.reasoning += reasoning;
    answer.tokens.push(...tokens);
    answer.tokenIds.push(...(choice.token_ids ?? []));
    answer.promptIds ??= choice.prompt_token_ids ?? null;
    answer.finish = choice.finish_reason ?? answer.finish;
  }
}

/** Tokens per second of the answer so far, from its first piece on; null before there is anything to count. */
export function tokensPerSecond(answer, now = performance.now()) {
  const count = answer.usage?.completion_tokens || answer.tokenIds.length || answer.tokens.length;
  const begin = answer.tokens.length > 1 ? answer.firstAt : answer.startedAt;
  const seconds = ((answer.endedAt ?? now) - begin) / 1000;
  return count && begin !== null && seconds > 0 ? count / seconds : null;
}

/** What the answer cost, in the config's currency, and how many tokens its members read and wrote. */
export function costOf(answer) {
  const used = Object.values(answer.ensemble?.usage ?? {});
  const sum = (name) => used.reduce((total, member) => total + (member[name] ?? 0), 0);
  return { cost: sum("cost"), memberTokens: sum("prompt_tokens") + sum("completion_tokens") };
}
