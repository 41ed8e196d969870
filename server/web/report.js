// Vote and Exchange: one question to an ensemble of texts, and the whole of how it came to its answer.

import { html, useState } from "./vendor/htm-preact.standalone.module.js";
import { ask, newAnswer, stop } from "./answer.js";
import { AnswerView } from "./answerview.js";
import { chatRequest } from "./models.js";
import { PromptBox } from "./prompting.js";
import { Trace } from "./trace.js";

/** `what`: "a vote", "an exchange". Without such a model a trace from a file can still be looked at. */
export function Report({ what, model, settings }) {
  const [prompt, write] = useState("");
  const [answer, show] = useState(null);
  const [saved, setSaved] = useState(null);
  const [live, setLive] = useState(null);
  const [problem, setProblem] = useState(null);
  const send = async () => {
    try {
      const asked = newAnswer(chatRequest(model, { ...settings, explain: true }, [{ role: "user", content: prompt }]));
      setProblem(null);
      setSaved(null);
      show(asked);
      setLive(asked);
      await ask(asked, { isSpoken: true });
    } catch (error) {
      setProblem(error.message);
    }
    setLive(null);
  };
  const open = async (file) => {
    try {
      const found = traceIn(JSON.parse(await file.text()));
      if (!found) throw new Error("it holds no trace of a vote or an exchange");
      setProblem(null);
      setSaved(found);
    } catch (error) {
      setProblem(`${file.name}: ${error.message}`);
    }
  };
  return html`<div class="report">
    ${model
      ? html`<${PromptBox} label="Question" value=${prompt} onInput=${write} onSend=${send} isLive=${live !== null} onStop=${() => stop(live)} verb="Ask" />`
      : html`<p class="empty">This server has no model that holds ${what}. A config gets one by a few lines; see the method guide.</p>`}
    <label class="file">Look at a trace from a file <input type="file" accept=".json,application/json"
      onChange=${(event) => event.target.files[0] && open(event.target.files[0])} /></label>
    ${problem && html`<p class="error" role="alert">${problem}</p>`}
    ${saved ? html`<${Trace} ensemble=${{ trace: saved }} />` : answer && html`<${AnswerView} answer=${answer} showsTrace />`}
  </div>`;
}

/** A trace as it is, or the one inside a whole answer. */
function traceIn(value) {
  if (typeof value !== "object" || value === null) return null;
  if (value.candidates || value.layers || (value.rounds && value.states)) return value;
  return traceIn(value.trace ?? value.ensemble ?? null);
}
