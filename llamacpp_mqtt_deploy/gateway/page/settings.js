// What the reader has set, in the browser's local storage.

const NAME = "lmd.settings";
const DEFAULTS = { systemPrompt: "", thinking: "", temperature: "", maxTokens: "", theme: "", way: "gateway", key: "", url: "", username: "", password: "", root: "" };

export function loadSettings() {
  try {
    const kept = JSON.parse(localStorage.getItem(NAME)) ?? {};
    return Object.fromEntries(Object.entries(DEFAULTS).map(([name, value]) => [name, typeof kept[name] === "string" ? kept[name] : value]));
  } catch {
    return { ...DEFAULTS };
  }
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(NAME, JSON.stringify(settings));
  } catch {
    // storage is forbidden here: it holds until the page is left
  }
}

/** The fields of a request that the settings ask for. */
export function requestFields({ systemPrompt, thinking, temperature, maxTokens }) {
  const fields = {};
  if (systemPrompt.trim()) fields.system_prompt = systemPrompt;
  if (thinking) fields.thinking = thinking === "on";
  if (temperature !== "") fields.temperature = Number(temperature);
  if (maxTokens !== "") fields.max_tokens = Number(maxTokens);
  return fields;
}
