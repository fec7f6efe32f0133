// The page: puts settings, chats, connection, conversation and transcript together, and listens to the reader's hands.

import { Chats, keptUnder } from "./chats.js";
import { connect } from "./connection.js";
import { Conversation } from "./conversation.js";
import { loadSettings, requestFields, saveSettings } from "./settings.js";
import { copy, Transcript } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const STATES = { connecting: "Connecting", up: "Connected", down: "Reconnecting" };
const SHOWN = "lmd.shown";

const settings = loadSettings();
const chats = new Chats();
let shown = null; // the id of the chat on the screen; null for one that nothing was said in yet

const transcript = new Transcript($("transcript"), $("turns"), $("to-end"), {
  speak,
  onAgain: (turn) => {
    conversation.again(shown, turn);
    redraw();
  },
});
const bus = await connect(settings, showState);
const conversation = new Conversation(chats, bus, (chatId, turn) => {
  if (chatId === shown) transcript.changed(chats.turns(chatId), turn);
  showRunning();
});

// --- chats -----------------------------------------------------------------------------------------------------------

function open(id) {
  shown = id;
  try {
    sessionStorage.setItem(SHOWN, id ?? "");
  } catch {
    // storage is forbidden here
  }
  redraw();
  closeMenu();
  // Where there are keys: on a touch screen the focus would bring the keyboard up.
  if (!narrow.matches && !matchMedia("(pointer: coarse)").matches) $("prompt").focus();
}

function redraw() {
  transcript.show(shown ? chats.turns(shown) : []);
  showChats();
  showRunning();
}

function showChats() {
  const title = (shown && chats.find(shown)?.title) || "New chat";
  $("title").textContent = title;
  document.title = `${title} · Chat`;
  $("welcome").hidden = Boolean(shown);
  const rows = chats.all.map(({ id, title: name }) => {
    const row = $("chat-row").content.firstElementChild.cloneNode(true);
    row.dataset.id = id;
    row.querySelector(".name").textContent = name || "New chat";
    row.querySelector(".open").addEventListener("click", () => open(id));
    row.querySelector(".rename").addEventListener("click", () => rename(id));
    row.querySelector(".remove").addEventListener("click", () => remove(id));
    for (const button of row.querySelectorAll(".icon")) button.setAttribute("aria-label", `${button.ariaLabel} ${name}`);
    if (id === shown) row.querySelector(".open").setAttribute("aria-current", "page");
    return row;
  });
  $("chats").replaceChildren(...rows);
}

function showRunning() {
  for (const row of $("chats").children) row.classList.toggle("runs", conversation.runs(row.dataset.id));
  const running = Boolean(shown && conversation.runs(shown));
  const focused = document.activeElement;
  $("send").hidden = running;
  $("stop").hidden = !running;
  $("send").disabled = !$("prompt").value.trim();
  if (focused === $("stop") && !running) $("prompt").focus();
}

function rename(id) {
  const { title } = chats.find(id);
  $("rename").querySelector("input").value = title;
  dialog($("rename"), "save", () => {
    chats.rename(id, $("rename").querySelector("input").value);
    showChats();
  });
  $("rename").querySelector("input").select();
}

function remove(id) {
  $("remove-name").textContent = chats.find(id).title;
  dialog($("remove"), "remove", () => {
    conversation.forget(id);
    chats.remove(id);
    if (id === shown) open(null);
    else showChats();
    $("new").focus();
  });
}

// --- asking ----------------------------------------------------------------------------------------------------------

function ask(text) {
  if (!text.trim() || (shown && conversation.runs(shown))) return;
  shown ??= chats.add().id;
  const turn = conversation.ask(shown, text.trim(), requestFields(settings));
  open(shown);
  transcript.changed(chats.turns(shown), turn);
  transcript.follow();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (shown && conversation.runs(shown)) return;
  $("prompt").value = "";
  fit();
  ask(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("prompt").addEventListener("input", fit);
$("stop").addEventListener("click", () => conversation.stop(shown));
for (const suggestion of document.querySelectorAll(".suggestion")) {
  suggestion.addEventListener("click", () => ask(suggestion.textContent));
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (document.body.classList.contains("menu")) closeMenu(true);
    else if (shown) conversation.stop(shown);
  }
  if (event.key.toLowerCase() === "o" && event.ctrlKey && event.shiftKey) {
    event.preventDefault();
    open(null);
  }
});

/** The field grows with its text, up to what the style sheet allows. */
function fit() {
  const field = $("prompt");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  $("send").disabled = !field.value.trim();
}

$("turns").addEventListener("click", ({ target }) => {
  const button = target.closest?.(".copy-code");
  if (button) copy(button, button.closest("figure").querySelector("code").textContent);
});

// --- what is said to a reader who does not see -------------------------------------------------------------------------

function speak(text) {
  const line = document.createElement("p");
  line.textContent = text.slice(0, 2000);
  $("spoken").append(line);
  while ($("spoken").children.length > 20) $("spoken").firstChild.remove();
}

function showState(state, sentence) {
  $("connection").dataset.state = state;
  $("connection").querySelector(".label").textContent = sentence ?? STATES[state];
}

// --- list of chats on a narrow screen ----------------------------------------------------------------------------------

const narrow = matchMedia("(max-width: 50rem)");
const arrange = () => {
  $("sidebar").inert = narrow.matches && !document.body.classList.contains("menu");
};
narrow.addEventListener("change", () => closeMenu());
arrange();

$("open-menu").addEventListener("click", () => {
  document.body.classList.add("menu");
  $("shade").hidden = false;
  $("open-menu").setAttribute("aria-expanded", "true");
  arrange();
  $("close-menu").focus();
});
$("close-menu").addEventListener("click", () => closeMenu(true));
$("shade").addEventListener("click", () => closeMenu(true));
$("new").addEventListener("click", () => open(null));

function closeMenu(back = false) {
  document.body.classList.remove("menu");
  $("shade").hidden = true;
  $("open-menu").setAttribute("aria-expanded", "false");
  arrange();
  if (back) $("open-menu").focus();
}

// --- dialogs -----------------------------------------------------------------------------------------------------------

/** Opens a dialog and acts when it is left by the button of this value. */
function dialog(box, value, act) {
  box.returnValue = "";
  box.showModal();
  for (const button of box.querySelectorAll(".cancel")) button.onclick = () => box.close();
  box.addEventListener("close", () => box.returnValue === value && act(), { once: true });
}

$("open-settings").addEventListener("click", () => {
  closeMenu();
  const form = $("settings").querySelector("form");
  for (const [name, value] of Object.entries(settings)) if (form.elements[name]) form.elements[name].value = value;
  showWay();
  dialog($("settings"), "save", () => {
    const before = JSON.stringify(settings);
    for (const name of Object.keys(settings)) settings[name] = form.elements[name]?.value ?? settings[name];
    if (JSON.stringify(settings) === before) return;
    saveSettings(settings);
    location.reload(); // what is under way goes on over the new connection
  });
});
$("settings").addEventListener("change", showWay);

function showWay() {
  const { way, url } = $("settings").querySelector("form").elements;
  for (const part of $("settings").querySelectorAll("[data-way]")) part.hidden = part.dataset.way !== way.value;
  url.required = way.value === "broker";
  url.disabled = way.value !== "broker";
}

// Another tab of this browser has changed the list, or a chat.
addEventListener("storage", ({ key }) => {
  const { list, id } = keptUnder(key);
  if (list) {
    chats.reload();
    if (shown && !chats.find(shown)) open(null);
    else showChats();
    showRunning();
  } else if (id && !conversation.runs(id)) {
    chats.reread(id);
    if (id === shown) redraw();
  }
});
addEventListener("pagehide", () => conversation.save());

// --- begin -------------------------------------------------------------------------------------------------------------

conversation.resume();
let begin = null;
try {
  begin = sessionStorage.getItem(SHOWN);
} catch {
  // storage is forbidden here
}
open(chats.find(begin) ? begin : null);
