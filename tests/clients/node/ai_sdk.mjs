// The AI SDK with the default model of @ai-sdk/openai, which speaks /v1/responses.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const openai = createOpenAI({ baseURL: `${process.env.SERVER}/v1`, apiKey: "none" });

const whole = await generateText({ model: openai("mix"), system: "Be brief.", prompt: "Say hello." });
assert.equal(whole.text, "Hello world");
assert.equal(whole.usage.outputTokens, 4);
assert.equal(whole.finishReason, "stop");

const streamed = streamText({ model: openai("mix"), prompt: "Say hello." });
let text = "";
for await (const piece of streamed.textStream) text += piece;
assert.equal(text, "Hello world");

const city = await generateText({ model: openai("json"), prompt: "Where?",
  output: Output.object({ schema: z.object({ city: z.string() }) }) });
assert.deepEqual(city.output, { city: "Oslo" });

const tools = { weather: tool({ description: "The weather in a city", inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `sunny in ${city}` }) };
for (const store of [true, false]) {
  const looped = await generateText({ model: openai("caller"), tools, prompt: "Weather in Oslo?",
    stopWhen: stepCountIs(3), providerOptions: { openai: { store } } });
  assert.equal(looped.text, "It is sunny in Oslo.");
  assert.equal(looped.steps.length, 2);
}
const looping = streamText({ model: openai("caller"), tools, prompt: "Weather in Oslo?", stopWhen: stepCountIs(3) });
assert.equal((await looping.text).endsWith("It is sunny in Oslo."), true);

const thought = await generateText({ model: openai("thinker"), prompt: "9 * 2?",
  providerOptions: { openai: { reasoningSummary: "auto", forceReasoning: true } } });
assert.equal(thought.text, "18");
assert.equal(thought.reasoningText, "Nine times two.");

const first = await generateText({ model: openai("mix"), prompt: "One?" });
const second = await generateText({ model: openai("mix"), messages: [
  { role: "user", content: "One?" }, ...first.response.messages, { role: "user", content: "Two?" }] });
assert.equal(second.text, "Hello world");

const chat = await generateText({ model: openai.chat("mix"), prompt: "Say hello." });
assert.equal(chat.text, "Hello world");

await assert.rejects(generateText({ model: openai("mixx"), prompt: "?", maxRetries: 0 }));
console.log("ok");
