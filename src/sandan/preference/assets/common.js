// What our pages have in common. Gradio runs this once with `element` (its HTML component) and `server` (the Python functions).
// Whatever a model wrote reaches the document as text nodes only.
const given = element.querySelector("[data-settings]");
const settings = JSON.parse(given.textContent);
given.remove();
const root = element.querySelector(".sandan");
const query = new URLSearchParams(location.search);
const remembered = (key, fallback) => localStorage.getItem(`sandan:${key}`) ?? fallback;
const browser = navigator.language.startsWith("ja") ? "ja" : "en";
// Every object has inherited keys such as "constructor", so that only its own keys count.
const languages = [query.get("language"), remembered("language", browser), browser];
const page = {
  language: languages.find((name) => Object.hasOwn(settings.strings, name ?? "")),
  annotator: query.get("annotator") ?? settings.annotator,
};
function t(key) {
  const strings = settings.strings[page.language];
  return Object.hasOwn(strings, key) ? strings[key] : key;
}
const letter = (index) => String.fromCharCode(65 + index);

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
}

// Characters that draw nothing or turn the writing direction are shown by their code, not obeyed.
const HIDDEN = new RegExp(settings.hidden, "gu");
function visible(text) {
  const parts = [];
  let from = 0;
  for (const match of text.matchAll(HIDDEN)) {
    const code = match[0].codePointAt(0);
    const name = `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
    parts.push(text.slice(from, match.index), h("span", { class: "control" }, name));
    from = match.index + match[0].length;
  }
  return [...parts, text.slice(from)];
}

// ------------------------------------------------------------------------------------------------------------- server

// Call a Python function until it answers; the same request may arrive twice.
async function request(name, data = {}) {
  const sent = { annotator: page.annotator, language: page.language, ...data };
  let reply;
  for (;;) {
    try {
      reply = await server[name](sent);
      if (reply && typeof reply === "object") break;
    } catch {
      // The server is away, or was started again.
    }
    root.querySelector(".banner").hidden = false;
    // A server that was started again wants a cookie of its own, which comes with the page.
    await fetch(location.pathname, { cache: "no-store" }).catch(() => null);
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  root.querySelector(".banner").hidden = true;
  return reply;
}

// ---------------------------------------------------------------------------------------------------------- rendering

function say(message, bad = false) {
  // Before the first item there is no line for messages; what is said then (a name that is none) is a banner.
  const live = root.querySelector(".live") ?? root.querySelector(".banner");
  live.hidden = false;
  live.textContent = message;
  live.classList.toggle("bad", bad);
}

function text(content) {
  return h("div", { class: "text", dir: "auto" }, visible(content));
}

function languageSelect(changed) {
  const names = { en: "English", ja: "日本語" };
  const choose = (event) => {
    page.language = event.target.value;
    localStorage.setItem("sandan:language", page.language);
    changed();
  };
  return h("select", { "aria-label": t("language"), onchange: choose },
    Object.keys(settings.strings).map((one) => h("option", { value: one, selected: one === page.language }, names[one])));
}

function helpDialog(rows) {
  return h("dialog", { class: "help", "aria-label": t("help") }, h("h2", {}, t("help")),
    h("dl", { class: "keys" }, rows.flatMap(([keys, name]) => [
      h("dt", {}, keys.map((key) => (key === "…" ? key : h("kbd", {}, key)))), h("dd", {}, t(`key_${name}`))])),
    h("form", { method: "dialog" }, h("button", { class: "primary" }, t("close"))));
}

function nameLanguage() {
  root.lang = document.documentElement.lang = page.language;
  document.title = t("title");
}
