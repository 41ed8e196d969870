// Text: a raw prompt and what the model writes after it, without a chat template.

import { html, useState } from "./vendor/htm-preact.standalone.module.js";
import { ask, branchOf, newAnswer, stop } from "./answer.js";
import { AnswerView } from "./answerview.js";
import { textRequest } from "./models.js";
import { PromptBox } from "./prompting.js";

export function Text({ model, settings }) {
  const [prompt, write] = useState("");
  const [answers, setAnswers] = useState([]); // of one prompt: the last one, and those that it is compared with
  const [live, setLive] = useState(null);
  const [problem, setProblem] = useState(null);

  const run = async (make, others) => {
    let answer;
    try {
      answer = make();
    } catch (error) {
      setProblem(error.message);
      return;
    }
    setProblem(null);
    setAnswers([...others, answer]);
    setLive(answer);
    await ask(answer, { isSpoken: true });
    setLive(null);
  };
  const fresh = () => newAnswer(textRequest(model, settings, prompt));
  const branch = (from) => (place, alternative) => run(() => {
    const answer = branchOf(from, place, alternative);
    answer.request = textRequest(model, settings, [...answer.promptIds, ...answer.tokenIds]);
    return answer;
  }, [from]);

  return html`<div class="text">
    <${PromptBox} label="Text to go on with" value=${prompt} onInput=${write} rows=${6} isLong verb="Continue" isLive=${live !== null}
      onSend=${() => run(fresh, [])} onStop=${() => stop(live)} />
    <p class="quiet">Ctrl+Enter continues the text. The model sees it as it stands, without a chat template.</p>
    ${problem && html`<p class="error" role="alert">${problem}</p>`}
    <div class=${answers.length > 1 ? "columns" : ""}>${answers.map((answer) => html`<${AnswerView} key=${answers.indexOf(answer)} answer=${answer} isRaw
      onBranch=${answer.promptIds && answer.request.body.model === model.id ? branch(answer) : null}>
      <button type="button" disabled=${live !== null} onClick=${() => write(prompt + answer.text)}>Add to the text</button>
      <button type="button" disabled=${live !== null} onClick=${() => run(fresh, [answer])}>Rerun with these</button>
    <//>`)}</div>
  </div>`;
}
