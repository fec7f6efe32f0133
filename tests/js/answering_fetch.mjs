// For `node --import`: a fetch that answers every request with its own prompt, and a page that keeps what it is given.
const line = (event) => `data: ${JSON.stringify(event)}\n\n`;

globalThis.fetch = async (url, { body }) => {
  const { request_id, prompt, messages } = JSON.parse(body);
  const content = prompt ?? messages.at(-1).content;
  const events = [
    { type: "start", request_id },
    { type: "chunk", request_id, seq: 0, content },
    { type: "done", request_id, seq: 1, final: true, finish_reason: "stop", full_content: content, timings: { tokens_per_second: 25 } },
  ];
  return new Response(events.map(line).join(""), { headers: { "content-type": "text/event-stream" } });
};
globalThis.document = { body: { append: (text) => process.stdout.write(text) } };
