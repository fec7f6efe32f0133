// The way to the worker: the gateway's WebSocket, its POST where WebSockets do not come through, or a broker by MQTT.js.

import { overFetch, overMqtt, overWebSocket, randomId } from "./lmd.js";

const COMES_BACK = 4000;
const SILENT = { session: "", up() {}, down() {}, event() {}, fail() {} };

/** Opens the way that the settings name. `onState` hears `connecting`, `up`, `down`, or `refused` with a sentence. */
export async function connect(settings, onState) {
  return settings.way === "broker" ? broker(settings, onState) : gateway(settings, onState);
}

function gateway({ key: given }, onState) {
  // A blank or a quotation mark that was copied with the key names no subprotocol: the browser would not even begin to connect.
  const key = given.replace(/[^\w!#$%&'*+.^`|~-]/g, "");
  const address = new URL("ws", document.baseURI);
  address.protocol = address.protocol.replace("http", "ws");
  const entries = new Map();
  let failures = 0;

  const socket = overWebSocket(address.href, {
    protocols: key ? ["lmd", `key.${key}`] : undefined,
    onState(state) {
      onState(state);
      if (state === "up") failures = -Infinity;
      else if (++failures === 2) toPosts();
    },
  });
  const post = overFetch(new URL("ask/events", document.baseURI).href, { headers: key ? { authorization: `Bearer ${key}` } : {} });
  let bus = socket;

  // A socket that could never be opened: some proxies let none through.
  function toPosts() {
    bus = post;
    onState("up");
    for (const [entry, close] of [...entries]) {
      close();
      entries.set(entry, post.open(entry));
    }
    socket.close();
  }

  // Keeps the socket open while nothing is asked, so that the first word of an answer does not wait for it.
  socket.open(SILENT);
  addEventListener("online", () => bus === socket && socket.renew());
  // A page that is loaded again goes on with its answers: the code tells the gateway not to cancel them at once.
  addEventListener("pagehide", () => socket.close(COMES_BACK));
  addEventListener("pageshow", ({ persisted }) => persisted && location.reload());
  return {
    session: (id) => id,
    open(entry) {
      entries.set(entry, bus.open(entry));
      return () => {
        entries.get(entry)?.();
        entries.delete(entry);
      };
    },
    send: (entry, body) => bus.send(entry, body),
    get control() {
      return bus.control;
    },
    get renew() {
      return bus.renew;
    },
  };
}

async function broker({ url, username, password, root }, onState) {
  const { default: mqtt } = await import("./vendored/mqtt.esm.js");
  const client = mqtt.connect(url, {
    clientId: `lmd-page-${randomId()}`,
    protocolVersion: 5,
    reconnectPeriod: 1000,
    keepalive: 30,
    timerVariant: "native", // the other one makes a worker from a blob, which the page's policy forbids
    ...(username && { username, password }),
  });
  let refused = false; // the connection closes right after, which is no news then
  const refuse = (sentence) => {
    refused = true;
    onState("refused", sentence);
  };
  client.on("connect", () => {
    refused = false;
    onState("up");
  });
  client.on("close", () => refused || onState("down"));
  addEventListener("securitypolicyviolation", ({ effectiveDirective }) => {
    if (effectiveDirective !== "connect-src") return;
    refuse("The gateway does not let this page speak to that broker (gateway.page_brokers)");
    client.end(true); // it will not, before the page is loaded again
  });
  client.on("error", ({ message, code }) => code && refuse(`The broker refuses the connection: ${message}`));
  const bus = overMqtt(client, { root: root || "llm" });
  // An access list binds the first level of a session to the user.
  return Object.assign(bus, { session: (id) => (username ? `${username}/${id}` : id) });
}
