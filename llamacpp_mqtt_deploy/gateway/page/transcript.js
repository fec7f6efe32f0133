// The turns of a chat on the screen. Text is set as text; only markdown.js makes elements of an answer.

import { Prose } from "./markdown.js";

const NEAR_END = 60; // pixels

export class Transcript {
  #views = new Map();
  #changed = new Set();
  #frame = 0;
  #following = true;

  /** `speak(text)` reads aloud; `onAgain(turn)` is the button under a failed answer. */
  constructor(scroller, list, toEnd, { speak, onAgain }) {
    Object.assign(this, { scroller, list, toEnd, speak, onAgain });
    scroller.addEventListener("scroll", () => {
      this.#following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;
      toEnd.hidden = this.#following;
    }, { passive: true });
    toEnd.addEventListener("click", () => this.follow());
    new ResizeObserver(() => this.#keepUp()).observe(list);
  }

  /** All turns of another chat. */
  show(turns) {
    this.#views.clear();
    this.#changed.clear();
    this.list.replaceChildren();
    turns.forEach((turn) => this.#view(turn).update(turn, () => {}));
    this.follow();
  }

  /** New turns, and those that have something new: drawn at the next frame, however many events came before it. */
  changed(turns, turn) {
    turns.forEach((each) => this.#view(each));
    this.#changed.add(turn);
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      for (const each of this.#changed) this.#views.get(each)?.update(each, this.speak);
      this.#changed.clear();
    });
  }

  follow() {
    this.#following = true;
    this.toEnd.hidden = true;
    this.#keepUp();
  }

  #keepUp() {
    if (this.#following) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  #view(turn) {
    let view = this.#views.get(turn);
    if (!view) {
      view = turn.role === "user" ? new Question(turn) : new Answer(() => this.onAgain(turn));
      this.#views.set(turn, view);
      this.list.append(view.root);
    }
    return view;
  }
}

const clone = (id) => document.getElementById(id).content.firstElementChild.cloneNode(true);

class Question {
  constructor({ text }) {
    this.root = clone("question-turn");
    this.root.querySelector(".text").textContent = text;
  }

  update() {}
}

class Answer {
  constructor(onAgain) {
    this.root = clone("answer-turn");
    this.part = (name) => this.root.querySelector(`.${name}`);
    this.prose = new Prose(this.part("prose"));
    this.part("again").addEventListener("click", onAgain);
    this.part("copy").addEventListener("click", () => copy(this.part("copy"), this.text));
  }

  update(turn, speak) {
    const ended = !turn.live;
    this.text = turn.text;
    this.root.setAttribute("aria-busy", String(!ended));
    this.root.classList.toggle("writing", turn.live?.phase === "writing");
    const finished = this.prose.update(turn.text, ended);
    finished.forEach(speak);
    this.#thinking(turn, ended);
    this.#calls(turn.calls ?? []);
    this.#waiting(turn);
    this.#problem(turn, speak);
    const footer = this.root.querySelector("footer");
    footer.hidden = !ended || !turn.finish;
    if (!footer.hidden) this.part("figures").textContent = figures(turn);
    this.part("copy").hidden = !turn.text;
  }

  #thinking({ reasoning, live, figures: told }, ended) {
    const box = this.part("thinking");
    box.hidden = !reasoning;
    if (!reasoning) return;
    const during = !ended && live.phase === "thinking";
    const seconds = (told?.thoughtMs ?? live?.thoughtMs) / 1000;
    box.classList.toggle("during", during);
    box.querySelector("summary").textContent = during ? "Thinking" : seconds ? `Thought for ${inSeconds(seconds * 1000)}` : "Thoughts";
    const text = box.querySelector(".text");
    if (text.textContent.length !== reasoning.length) text.textContent = reasoning;
  }

  #calls(calls) {
    const box = this.part("calls");
    while (box.children.length > calls.length) box.lastChild.remove();
    calls.forEach(({ function: called }, at) => {
      const call = box.children[at] ?? box.appendChild(clone("tool-call"));
      call.querySelector("summary code").textContent = called?.name ?? "";
      call.querySelector("pre").textContent = indented(called?.arguments ?? "");
    });
  }

  #waiting({ live, text }) {
    const box = this.part("waiting");
    const shown = live && live.phase !== "writing" && live.phase !== "thinking" && !text;
    box.hidden = !shown;
    if (!shown) return;
    box.querySelector(".label").textContent = waitingFor(live);
    const bar = box.querySelector("progress");
    bar.hidden = live.phase !== "reading";
    if (!bar.hidden) bar.value = live.share || 0;
  }

  #problem({ problem }, speak) {
    const box = this.part("problem");
    const text = problem ? `${problem.message ?? problem.code}` : "";
    box.hidden = !problem;
    if (problem && box.firstElementChild.textContent !== text) speak(text);
    box.firstElementChild.textContent = text;
  }
}

function waitingFor({ phase, position, reason, share }) {
  if (phase === "queued" && reason === "loading") return "The model is being loaded";
  if (phase === "queued" && reason === "engine_restarting") return "The engine starts again";
  if (phase === "queued") return position > 0 ? `Waiting, place ${position} in the queue` : "Waiting for a free place";
  if (phase === "reading") return `Reading, ${Math.round((share || 0) * 100)} %`;
  return "";
}

function figures({ figures: told = {}, finish }) {
  const parts = [];
  if (finish === "cancelled") parts.push("Stopped");
  if (finish === "length") parts.push("Cut at the longest answer");
  if (told.perSecond) parts.push(`${told.perSecond >= 100 ? Math.round(told.perSecond) : told.perSecond.toFixed(1)} tokens/s`);
  if (told.firstTokenMs != null) parts.push(`first token ${inSeconds(told.firstTokenMs)}`);
  if (told.tokens) parts.push(`${told.tokens} tokens`);
  if (told.dropped) parts.push(`${told.dropped} earlier messages no longer fit`);
  if (told.model) parts.push(told.model);
  return parts.join(" · ");
}

const inSeconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // still coming
  }
}

/** Copies, and shows for a moment that it did. */
export async function copy(button, text) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else copyByHand(text);
  button.classList.add("did");
  setTimeout(() => button.classList.remove("did"), 1500);
}

/** Without https a page gets no clipboard, but may still press the keys. */
function copyByHand(text) {
  const [field, focused] = [document.createElement("textarea"), document.activeElement];
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
  focused?.focus();
}
