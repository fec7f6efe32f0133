// A program that uses lmd.js with the real MQTT.js: node over_mqtt.mjs URL. Commands and what happens are lines of JSON.
// {"ask": NAME, "request": {...}} and {"cancel": NAME} come in; {name, content}, {name, end} and {connection} go out.
import { createInterface } from "node:readline";

import mqtt from "mqtt";

import { ask, llmAPI, overMqtt } from "../../clients/js/lmd.js";

const say = (what) => process.stdout.write(`${JSON.stringify(what)}\n`);
const client = mqtt.connect(process.argv[2], { reconnectPeriod: 100, protocolVersion: Number(process.argv[3] ?? 5) });
client.on("connect", () => say({ connection: "up" }));
client.on("close", () => say({ connection: "down" }));
client.on("error", () => {});
const bus = overMqtt(client);
const stops = {};

for await (const line of createInterface({ input: process.stdin })) {
  const { ask: name, chat, cancel, request } = JSON.parse(line);
  if (name) {
    const asked = ask(bus, request, { onNews: ({ content, event }) => say({ name, content, type: event.type }) });
    stops[name] = asked.cancel;
    asked.done.then(({ end, content }) => say({ name, end, content }));
  } else if (chat) {
    const told = (what) => (value) => say({ name: chat, [what]: value });
    stops[chat] = llmAPI(bus).chatSessionStream(request, told("content"), told("complete"), told("failed"));
  } else if (cancel) stops[cancel]();
}
bus.close();
client.end(true);
