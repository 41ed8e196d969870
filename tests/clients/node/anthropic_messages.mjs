// The official `@anthropic-ai/sdk` package against /v1/messages.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.env.SERVER, apiKey: "none", maxRetries: 0 });
const ask = (content) => ({ max_tokens: 100, messages: [{ role: "user", content }] });
const WEATHER = { name: "weather",
  input_schema: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } };

const whole = await client.messages.create({ model: "mix", ...ask("Say hello.") });
assert.equal(whole.content[0].text, "Hello world");
assert.equal(whole.stop_reason, "end_turn");
assert.equal(whole.usage.output_tokens, 4);

const stream = client.messages.stream({ model: "mix", ...ask("Say hello.") });
let text = "";
stream.on("text", (delta) => (text += delta));
assert.deepEqual((await stream.finalMessage()).usage.output_tokens, 4);
assert.equal(text, "Hello world");

const messages = [{ role: "user", content: "Weather in Oslo?" }];
const asked = { model: "caller", max_tokens: 100, tools: [WEATHER] };
const called = await client.messages.stream({ ...asked, messages }).finalMessage();
assert.equal(called.stop_reason, "tool_use");
const call = called.content.find((block) => block.type === "tool_use");
assert.deepEqual(call.input, { city: "Oslo" });
messages.push({ role: "assistant", content: called.content },
  { role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "sunny" }] });
assert.equal((await client.messages.create({ ...asked, messages })).content[0].text, "It is sunny.");

const thought = await client.messages.stream({ model: "thinker", ...ask("9 * 2?"),
  thinking: { type: "enabled", budget_tokens: 1024 } }).finalMessage();
assert.deepEqual(thought.content.map((block) => block.thinking ?? block.text), ["Nine times two.", "18"]);

const counted = await client.messages.countTokens({ model: "mix", messages: ask("Say hello.").messages });
assert.equal(counted.input_tokens, whole.usage.input_tokens);

const listed = [];
for await (const model of client.models.list()) listed.push(model.id);
assert(listed.includes("mix"));

await assert.rejects(client.messages.create({ model: "mixx", ...ask("?") }), Anthropic.NotFoundError);
await assert.rejects(async () => {
  for await (const _ of await client.messages.create({ model: "dies", stream: true, ...ask("?") }));
}, Anthropic.APIError);
console.log("ok");
