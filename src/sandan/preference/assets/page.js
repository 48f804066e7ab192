// The ranking page; it runs after common.js.
Object.assign(page, {
  state: null, ranks: [], flags: [], note: "", last: null, flagging: null, shownAt: 0, seconds: 0, busy: false,
});

// ------------------------------------------------------------------------------------------------------------- server

async function call(name, data = {}) {
  if (page.busy) return;
  page.busy = true;
  const reply = await request(name, data);
  page.busy = false;
  if (reply.error) say(reply.error, true);
  else show(reply);
}

function show(state) {
  const fresh = state.item?.ticket !== page.state?.item?.ticket || state.reopened;
  page.state = state;
  if (fresh && state.item) {
    const kept = JSON.parse(remembered(state.item.ticket, "null")) ?? {};
    const draft = { ...state.item.draft, ...(state.reopened ? {} : kept) };
    const blank = state.item.candidates.map(() => null);
    page.ranks = draft.ranks ?? blank;
    page.flags = draft.flags ?? state.item.candidates.map(() => []);
    page.note = draft.note ?? "";
    page.seconds = draft.seconds ?? 0;
    page.last = page.flagging = null;
    page.shownAt = performance.now();
  }
  render();
  if (state.message) say(t(state.message), state.refused);
  if (fresh) window.scrollTo(0, 0);
  if (state.item) focusCard(0);
}

// A pause with the page out of sight is not time spent on the item.
const elapsed = () => page.seconds + (page.shownAt ? (performance.now() - page.shownAt) / 1000 : 0);
document.addEventListener("visibilitychange", () => {
  page.seconds = elapsed();
  page.shownAt = document.hidden ? 0 : performance.now();
  if (page.state?.item) keep();
});

function keep() {
  const { ranks, flags, note } = page;
  localStorage.setItem(`sandan:${page.state.item.ticket}`, JSON.stringify({ ranks, flags, note, seconds: elapsed() }));
}

async function decide(name, data) {
  const { ticket } = page.state.item;
  const { flags, note } = page;
  const seconds = Math.round(elapsed() * 100) / 100;
  await call(name, { ticket, flags, note, seconds, guidelines: page.state.guidelines.hash, ...data });
  if (page.state.item?.ticket !== ticket) localStorage.removeItem(`sandan:${ticket}`);
}

// ------------------------------------------------------------------------------------------------------------ actions

function rank(index, value) {
  page.ranks[index] = value;
  if (value != null) page.last = value;
  changed(index);
}

function toggleFlag(index, flag) {
  const flags = page.flags[index];
  page.flags[index] = flags.includes(flag) ? flags.filter((one) => one !== flag) : [...flags, flag];
  changed(index);
}

function changed(index) {
  keep();
  const old = root.querySelectorAll(".card")[index];
  const had = old.contains(document.activeElement);
  const fresh = card(page.state.item.candidates[index], index);
  fresh.querySelector(".text").replaceWith(old.querySelector(".text")); // keeps the place one has scrolled to
  old.replaceWith(fresh);
  if (had) fresh.focus({ preventScroll: true });
  renderOrder();
}

function submit() {
  const missing = page.ranks.map((value, index) => (value == null ? letter(index) : null)).filter(Boolean);
  if (missing.length) {
    say(t("incomplete") + missing.join(", "), true);
    focusCard(page.ranks.indexOf(null));
  } else decide("judge_item", { ranks: page.ranks });
}

const undo = () => call("undo_last");
const askSkip = () => root.querySelector("dialog.skip").showModal();
function skip(reason) {
  root.querySelector("dialog.skip").close();
  decide("skip_item", { reason });
}

const cards = () => [...root.querySelectorAll(".card")];
const focused = () => cards().indexOf(document.activeElement?.closest(".card"));
function focusCard(index) {
  const all = cards();
  const target = all[Math.max(0, Math.min(index, all.length - 1))];
  target?.focus({ preventScroll: true });
  if (index > 0 || window.scrollY > 0) target?.scrollIntoView({ block: "nearest" });
}

// While an answer is being flagged, the digits choose its flags and not its rank.
function flagAnswer(index) {
  const before = page.flagging;
  page.flagging = index === before ? null : index;
  for (const one of new Set([before, page.flagging])) if (one != null) changed(one);
  focusCard(index ?? before ?? Math.max(0, focused()));
}

function onDigit(digit) {
  const count = page.ranks.length;
  const at = Math.max(0, focused());
  if (page.flagging === at) {
    if (settings.flags[digit - 1]) toggleFlag(at, settings.flags[digit - 1]);
    return;
  }
  if (digit === 0) return rank(at, null);
  if (digit > count) return;
  rank(at, digit);
  advance(at);
}

function advance(at) {
  const order = [...page.ranks.keys()];
  const next = [...order.slice(at + 1), ...order.slice(0, at)].find((index) => page.ranks[index] == null);
  focusCard(next ?? at);
}

function onKey(event) {
  const dialog = root.querySelector("dialog[open]");
  if (dialog) {
    const choice = dialog.querySelectorAll(".choices button")[Number(event.key) - 1];
    if (choice) choice.click();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || !root.isConnected) return;
  const typing = event.target.closest?.("textarea, input, select");
  if (typing) {
    if (event.key === "Escape" && page.state?.item) focusCard(0);
    return;
  }
  const done = handle(event.key, event.target.closest?.("button, summary, a"));
  if (done) event.preventDefault();
}

function handle(key, control) {
  if (key === "?") return root.querySelector("dialog.help").showModal() ?? true;
  if (key.toLowerCase() === "u") return undo(), true;
  if (!page.state?.item) return false;
  const at = focused();
  const card = Math.max(0, at);
  if (/^[0-9]$/.test(key)) return onDigit(Number(key)), true;
  if (["ArrowDown", "ArrowRight", "j"].includes(key)) return focusCard(at + 1), true;
  if (["ArrowUp", "ArrowLeft", "k"].includes(key)) return focusCard(at - 1), true;
  if (key === "Backspace") return rank(card, null), true;
  if (key === "=") {
    if (page.last == null) return false;
    rank(card, page.last);
    return advance(card), true;
  }
  if (key === "Escape") return flagAnswer(null), true;
  if (key === "Enter" && !control) return submit(), true;
  if (key.toLowerCase() === "s") return askSkip(), true;
  if (key.toLowerCase() === "n") return root.querySelector("textarea").focus(), true;
  if (key.toLowerCase() === "f") return flagAnswer(card), true;
  return false;
}

// ---------------------------------------------------------------------------------------------------------- rendering

function turn({ role, content }) {
  return h("div", { class: `turn ${role === "assistant" ? role : ""}` }, h("small", {}, t(role)), text(content));
}

function card(content, index) {
  const value = page.ranks[index];
  const name = `${t("answer")} ${letter(index)}`;
  const flags = page.flags[index];
  const digits = page.ranks.map((_, at) => at + 1);
  const flagging = page.flagging === index;
  const place = value == null ? t("unranked") : `${t("ranked")} ${value}`;
  const press = (action) => () => { action(); focusCard(index); };
  return h("article", {
      class: `card ${value == null ? "" : "ranked"}`, tabindex: "0", role: "group",
      "aria-label": `${name}, ${place}${flags.length ? ", " + flags.map(t).join(", ") : ""}`,
    },
    h("header", {}, h("span", { class: "letter" }, letter(index)), h("span", { class: "place" }, place),
      h("button", {
        type: "button", class: "flag-button", "aria-expanded": String(flagging),
        "aria-label": `${t("flag")}, ${name}`, onclick: () => flagAnswer(index),
      }, `⚑ ${t("flag")}`)),
    text(content),
    h("div", { class: "row ranks", role: "group", "aria-label": `${t("rank")}, ${name}` },
      digits.map((digit) => h("button", {
        type: "button", "aria-pressed": String(value === digit), "aria-label": `${t("rank")} ${digit}, ${name}`,
        onclick: press(() => rank(index, value === digit ? null : digit)),
      }, String(digit)))),
    h("div", { class: "row flags", role: "group", "aria-label": `${t("flags")}, ${name}`, hidden: !flagging && !flags.length },
      settings.flags.map((flag, at) => h("button", {
        type: "button", "aria-pressed": String(flags.includes(flag)), onclick: press(() => toggleFlag(index, flag)),
      }, t(flag), flagging ? h("kbd", {}, String(at + 1)) : null))));
}

function renderOrder() {
  const places = new Map();
  page.ranks.forEach((value, index) => {
    if (value != null) places.set(value, [...(places.get(value) ?? []), letter(index)]);
  });
  const groups = [...places.keys()].sort((a, b) => a - b).map((value) => places.get(value).join(" = "));
  const order = root.querySelector(".order");
  order.replaceChildren(...(groups.length ? [h("span", { class: "quiet" }, `${t("order")} `), h("b", {}, groups.join(" > "))]
    : [h("span", { class: "quiet" }, t("order_empty"))]));
  root.querySelector(".primary").disabled = page.ranks.includes(null);
}

function figures({ judged, skipped, left, items_per_hour, seconds_per_item }) {
  const figure = (value, unit) => h("span", {}, h("b", {}, value.toLocaleString(page.language)), ` ${unit}`);
  return h("div", { class: "figures" }, figure(judged, t("judged")), figure(left, t("left")),
    skipped ? figure(skipped, t("skipped")) : null, items_per_hour ? figure(items_per_hour, t("per_hour")) : null,
    seconds_per_item ? figure(seconds_per_item, t("each")) : null);
}

function topBar(progress) {
  const choose = () => (page.state ? call("open_item") : render());
  return h("header", { class: "top" },
    h("div", { class: "brand" }, "sandan ", h("span", {}, page.annotator ?? "三段")),
    progress ? figures(progress) : null,
    h("div", { class: "right" },
      languageSelect(choose),
      h("button", { type: "button", onclick: () => root.querySelector("dialog.help").showModal() }, t("help"), h("kbd", {}, "?"))));
}

function guidelines({ html, hash }) {
  const body = h("div", {});
  body.innerHTML = html; // rendered by the server from the project's own file, raw HTML left out
  const wide = matchMedia("(min-width: 901px)").matches;
  return h("aside", { "aria-label": t("guidelines") },
    h("details", { open: wide }, h("summary", {}, t("guidelines")), body, h("code", { title: hash }, hash)));
}

const KEYS = [[["1", "…", "9"], "digit"], [["↑", "↓"], "move"], [["="], "tie"], [["0"], "clear"], [["Enter"], "enter"],
  [["S"], "skip"], [["U"], "undo"], [["F"], "flag"], [["N"], "note"], [["Esc"], "escape"], [["?"], "help"]];

function skipDialog() {
  return h("dialog", { class: "skip", "aria-label": t("skip_title") }, h("h2", {}, t("skip_title")),
    h("div", { class: "choices" }, settings.reasons.map((reason, index) =>
      h("button", { type: "button", onclick: () => skip(reason) }, t(reason), h("kbd", {}, String(index + 1))))),
    h("form", { method: "dialog" }, h("button", {}, t("cancel"))));
}

function item({ turns, candidates }) {
  return [
    h("section", { class: "work" },
      h("h2", {}, t(turns.length > 1 ? "conversation" : "prompt")),
      h("div", { class: "turns" }, turns.map(turn)),
      h("h2", {}, t("answers")),
      h("div", { class: "cards" }, candidates.map(card)),
      h("label", { class: "note" }, h("span", {}, t("note"), " ", h("small", {}, t("note_hint"))),
        h("textarea", { rows: "2", maxlength: settings.note_characters, oninput: (event) => { page.note = event.target.value; keep(); } }, page.note))),
    guidelines(page.state.guidelines)];
}

function actions() {
  const button = (name, key, action, kind) =>
    h("button", { type: "button", class: kind, onclick: action }, t(name), h("kbd", {}, key));
  return h("div", { class: "actions", role: "toolbar", "aria-label": t("actions") }, h("div", {},
    h("div", { class: "say" }, h("div", { class: "order" }), h("div", { class: "live", role: "status", "aria-live": "polite" })),
    button("undo", "U", undo), page.state.item ? button("skip", "S", askSkip) : null,
    page.state.item ? button("submit", "↵", submit, "primary") : null));
}

function namePanel() {
  const enter = (event) => {
    event.preventDefault();
    query.set("annotator", new FormData(event.target).get("name"));
    location.search = query;
  };
  return h("form", { class: "panel", onsubmit: enter }, h("h1", {}, t("name_title")), h("p", {}, t("name_text")),
    h("label", {}, t("name"), h("input", { name: "name", required: true, pattern: "[A-Za-z0-9_\\-]{1,32}", autocomplete: "username" })),
    h("button", { class: "primary" }, t("start")));
}

function donePanel({ next_command }) {
  return h("section", { class: "panel" }, h("h1", {}, t("done_title")), h("p", {}, t("done_text")),
    h("p", {}, t("done_next")), h("code", {}, next_command));
}

function render() {
  nameLanguage();
  const { state } = page;
  const total = state ? state.progress.judged + state.progress.skipped + state.progress.left : 0;
  const share = total ? (100 * (total - state.progress.left)) / total : 0;
  const bar = h("i", {});
  bar.style.width = `${share}%`;
  root.replaceChildren(topBar(state?.progress), h("div", { class: "track", role: "progressbar", "aria-valuenow": String(Math.round(share)), "aria-label": t("judged") }, bar),
    h("div", { class: "banner", role: "alert", hidden: true }, t("lost")),
    ...(!page.annotator ? [namePanel()] : state?.item ? [h("main", { class: "grid" }, item(state.item))] : state ? [h("main", {}, donePanel(state))] : []),
    ...(state ? [actions()] : []), helpDialog(KEYS), skipDialog());
  if (state?.item) renderOrder();
}

document.addEventListener("keydown", onKey);
render();
if (page.annotator) call("open_item");
