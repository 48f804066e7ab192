// The chat page; it runs after common.js, which all our pages share.
const FOLLOW_MILLISECONDS = 100;
const KEYS = [[["Enter"], "ask"], [["1", "…", "4"], "place"], [["="], "equal"], [["U"], "take_back"],
  [["Q"], "question"], [["N"], "new"], [["Esc"], "escape"], [["?"], "help"]];
Object.assign(page, { conversation: null, rounds: [], draft: "", asking: false,
  temperature: settings.temperature, seed: settings.seed, blind: settings.blind });
const last = () => page.rounds.at(-1);
const isAnswering = () => page.asking || (last() && !last().complete);
const canVote = () => last() && last().obstacle === null;

// ------------------------------------------------------------------------------------------------------------- server

async function call(name, data = {}) {
  const reply = await request(name, { conversation: page.conversation, ticket: last()?.ticket, ...data });
  if (reply.error) say(reply.error, true);
  return reply.error ? null : reply;
}

async function open(conversation) {
  const reply = await call("open_chat", { conversation });
  if (!reply) return;
  Object.assign(page, reply);
  sessionStorage.setItem("sandan:conversation", page.conversation);
  render();
  focusQuestion();
  if (isAnswering()) await follow();
}

async function ask() {
  const question = page.draft.trim();
  if (!question || isAnswering()) return;
  page.asking = true;
  const { temperature, seed, blind } = page;
  const reply = await call("ask_models", { question, number: page.rounds.length, temperature, seed, blind });
  page.asking = false;
  if (!reply) return;
  page.draft = "";
  page.rounds.push(reply.round);
  render();
  root.querySelector(".round:last-of-type").scrollIntoView({ block: "start" });
  await follow();
}

async function follow() {
  const { conversation } = page;
  while (page.conversation === conversation && !last().complete) {
    await new Promise((resolve) => setTimeout(resolve, FOLLOW_MILLISECONDS));
    const reply = await call("follow");
    if (!reply || page.conversation !== conversation) return;
    update(reply.round);
  }
  if (page.conversation !== conversation) return;
  renderBottom();
  // The keys that vote are at hand, unless the next question is being written.
  if (!page.draft) root.querySelector(".round:last-of-type .card")?.focus({ preventScroll: true });
}

async function vote(best) {
  if (!canVote()) return;
  const reply = await call("vote_for", { best });
  if (reply) changed(reply.round, "saved_vote");
}

async function takeBack() {
  if (last()?.best == null) return;
  const reply = await call("take_back_vote");
  if (reply) changed(reply.round, "taken_back");
}

async function stop() {
  const reply = isAnswering() ? await call("stop_answers") : null;
  if (reply) update(reply.round);
}

function begin() {
  if (!isAnswering()) open(null);
}

// ---------------------------------------------------------------------------------------------------------- rendering

function card(answer, place, asked) {
  const isLast = asked === last();
  const best = asked.best === place;
  const votes = isLast && asked.obstacle === null;
  const state = answer.complete ? (best ? t("best") : "") : answer.text ? t("writing") : t("waiting");
  return h("article", { class: `card ${best ? "ranked" : ""}`, tabindex: "0", role: "group", "aria-label": answer.label,
      "aria-busy": String(!answer.complete) },
    h("header", {}, h("span", { class: "letter" }, visible(answer.label)), h("span", { class: "place" }, state)),
    text(answer.text),
    votes ? h("div", { class: "row" }, h("button", {
      type: "button", class: best ? "primary" : "", "aria-pressed": String(best), onclick: () => vote(place),
      "aria-label": `${t("better")}: ${answer.label}`,
    }, t("better"), h("kbd", {}, String(place + 1)))) : null);
}

function round(asked) {
  const about = `${t("temperature")} ${asked.temperature} · ${t("seed")} ${asked.seed}`;
  return h("section", { class: "round" },
    h("div", { class: "turn" }, h("small", {}, t("user"), " · ", about), text(asked.question)),
    asked.error ? h("div", { class: "banner", role: "alert" }, visible(asked.error)) : null,
    h("div", { class: "cards" }, asked.answers.map((answer, place) => card(answer, place, asked))));
}

// While answers are written only their texts change; cards are made anew when they end, or when names are shown.
function update(asked) {
  const before = last();
  const shape = (one) => JSON.stringify([one.complete, one.best, one.obstacle, one.error, one.answers.map(({ label, complete, text }) => [label, complete, !text])]);
  page.rounds[page.rounds.length - 1] = asked;
  const section = root.querySelector(".round:last-of-type");
  if (shape(before) !== shape(asked)) {
    const focused = [...section.querySelectorAll(".card")].indexOf(document.activeElement?.closest(".card"));
    const fresh = round(asked);
    section.replaceWith(fresh);
    if (focused >= 0) fresh.querySelectorAll(".card")[focused].focus({ preventScroll: true });
    return;
  }
  section.querySelectorAll(".card .text").forEach((node, place) => {
    if (before.answers[place].text !== asked.answers[place].text) node.replaceChildren(...visible(asked.answers[place].text));
  });
}

function changed(asked, message) {
  update(asked);
  renderBottom();
  say(t(message));
}

function options() {
  const number = (name, attributes) => h("label", {}, t(name), h("input", {
    type: "number", name, value: page[name], ...attributes,
    oninput: (event) => { if (event.target.checkValidity() && event.target.value) page[name] = Number(event.target.value); },
  }));
  return h("div", { class: "options" },
    number("temperature", { min: 0, max: 10, step: "any" }), number("seed", { min: 0, max: 2 ** 32 - 1, step: 1 }),
    h("label", { class: "check", title: t("blind_hint") }, h("input", {
      type: "checkbox", name: "blind", checked: page.blind, onchange: (event) => { page.blind = event.target.checked; } }), t("blind")));
}

function questionForm() {
  const submit = (event) => { event.preventDefault(); ask(); };
  const onkeydown = (event) => {
    // Enter that ends the conversion of Japanese input is not a question yet.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  };
  const size = { rows: "2", maxlength: settings.question_characters };
  return h("form", { class: "question", onsubmit: submit },
    h("textarea", { ...size, "aria-label": t("question"), placeholder: t("question_hint"), onkeydown,
      oninput: (event) => { page.draft = event.target.value; } }, page.draft),
    h("div", { class: "row" }, options(), h("span", { class: "spread" }), bottomButtons()));
}

function bottomButtons() {
  const button = (name, key, action, kind = "") =>
    h("button", { type: "button", class: kind, onclick: action }, t(name), h("kbd", {}, key));
  return h("div", { class: "row buttons" },
    canVote() ? button("equal", "=", () => vote(settings.equal), last().best === settings.equal ? "primary" : "") : null,
    last()?.best != null ? button("take_back", "U", takeBack) : null,
    isAnswering() ? button("stop", "Esc", stop) : button("ask", "↵", ask, "primary"));
}

function renderBottom() {
  root.querySelector(".buttons").replaceWith(bottomButtons());
  const asked = last();
  say(!asked || !asked.complete ? "" : asked.obstacle ? t(asked.obstacle) : asked.best == null ? t("choose") : "");
}

function focusQuestion() {
  root.querySelector("textarea").focus({ preventScroll: true });
}

function render() {
  nameLanguage();
  root.replaceChildren(
    h("header", { class: "top" }, h("div", { class: "brand" }, "sandan ", h("span", {}, page.annotator)),
      h("div", { class: "right" }, h("button", { type: "button", onclick: begin }, t("new"), h("kbd", {}, "N")),
        languageSelect(render),
        h("button", { type: "button", onclick: () => root.querySelector("dialog.help").showModal() }, t("help"), h("kbd", {}, "?")))),
    h("div", { class: "banner", role: "alert", hidden: true }, t("lost")),
    h("main", { class: "talk" }, page.rounds.map(round)),
    h("div", { class: "actions ask" }, h("div", {}, h("div", { class: "live", role: "status", "aria-live": "polite" }), questionForm())),
    helpDialog(KEYS));
  renderBottom();
}

// --------------------------------------------------------------------------------------------------------------- keys

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !root.isConnected || root.querySelector("dialog[open]")) return;
  if (event.target.closest?.("textarea, input, select")) {
    if (event.key === "Escape") isAnswering() ? stop() : (root.querySelector(".round:last-of-type .card") ?? document.activeElement).focus();
    return;
  }
  const key = event.key.toLowerCase();
  const actions = { "=": () => vote(settings.equal), u: takeBack, q: focusQuestion, n: begin, escape: stop,
    "?": () => root.querySelector("dialog.help").showModal() };
  const action = /^[1-4]$/.test(key) && last()?.answers[key - 1] ? () => vote(key - 1) : Object.hasOwn(actions, key) ? actions[key] : null;
  if (!action) return;
  event.preventDefault();
  action();
}

document.addEventListener("keydown", onKey);
render();
open(sessionStorage.getItem("sandan:conversation"));
