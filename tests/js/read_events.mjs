// Standard input: cases of [request id, events]. Standard output: what the reader made of each.
import { readFileSync } from "node:fs";

import { Reader } from "../../clients/js/lmd.js";

const outcomes = JSON.parse(readFileSync(0, "utf8")).map(([requestId, events]) => {
  const reader = new Reader(requestId);
  const told = events.map((event) => reader.feed(event)?.content ?? "");
  const { content, reasoning, next, lacks, end, toolCalls } = reader;
  return { told, content, reasoning, next, lacks, end: end?.type ?? null, tool_calls: toolCalls.filter(Boolean) };
});
process.stdout.write(JSON.stringify(outcomes));
