// Runs a flow of Node-RED as far as this flow needs it: function nodes with msg, flow and node, wires, and a clock set by the test.
// Standard input: {flow, steps}; a step presses a button, receives events on the topic of an `mqtt in` node, or lets time pass.
const { flow: nodes, steps } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const byId = Object.fromEntries(nodes.map((node) => [node.id, node]));
const kept = {};
const flow = { get: (name) => kept[name], set: (name, value) => { kept[name] = value; } };
const outcome = { published: [], shown: {}, status: [] };
let now = 1e12;
Date.now = () => now;

function deliver(id, msg) {
  const node = byId[id];
  if (node.type === "mqtt out") outcome.published.push({ topic: node.topic, qos: node.qos, retain: node.retain, payload: msg.payload });
  else if (node.type === "debug") (outcome.shown[node.name] ??= []).push(msg);
  else if (node.type === "function") {
    const api = { status: (status) => outcome.status.push(status.text), error: (text) => { throw new Error(text); } };
    const made = new Function("msg", "flow", "context", "node", node.func)(msg, flow, {}, api);
    const outputs = Array.isArray(made) ? made : [made];
    if (outputs.length > node.outputs) throw new Error(`${id} has ${node.outputs} outputs`);
    outputs.forEach((sent, at) => sent && node.wires[at].forEach((next) => deliver(next, structuredClone(sent))));
  } else throw new Error(`nothing is delivered to ${node.type}`);
}

const from = (node, msg) => node.wires.flat().forEach((next) => deliver(next, structuredClone(msg)));
const repeating = nodes.filter((node) => node.type === "inject" && node.repeat);

for (const step of steps) {
  if (step.press) from(nodes.find((node) => node.type === "inject" && node.name === step.press), { payload: byId["lmd-ask"].payload });
  for (const event of step.receive ?? []) {
    const payload = JSON.parse(JSON.stringify(event).replaceAll("REQUEST-ID", kept.request?.id));
    from(nodes.find((node) => node.type === "mqtt in"), { topic: "llm/reply/nodered", payload });
  }
  for (let second = 0; second < (step.wait ?? 0); second += 1) {
    now += 1000;
    for (const node of repeating) if ((now / 1000) % Number(node.repeat) === 0) from(node, {});
  }
}
console.log(JSON.stringify(outcome));
