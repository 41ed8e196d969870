// node agents/ai_sdk.mjs BASE_URL generate|stream: asks for the weather with a tool, and prints what came of it as JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [baseURL, way] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "ensemble", baseURL, apiKey: "none" });
const settings = {
  model: provider("far"),
  prompt: "Do I need an umbrella in Oslo?",
  stopWhen: stepCountIs(3),
  maxRetries: 0,
  tools: {
    weather: tool({
      description: "The weather in a city",
      inputSchema: z.object({ city: z.string() }),
      execute: async ({ city }) => `rainy in ${city}`,
    }),
  },
};
const result = way === "stream" ? streamText(settings) : await generateText(settings);
if (way === "stream") {
  for await (const part of result.fullStream) if (part.type === "error") throw part.error;
}
const steps = await result.steps;
console.log(
  JSON.stringify({
    text: await result.text,
    steps: steps.length,
    calls: steps.flatMap((step) => step.toolCalls.map(({ toolName, input }) => ({ toolName, input }))),
    finishReasons: steps.map((step) => step.finishReason),
  }),
);
