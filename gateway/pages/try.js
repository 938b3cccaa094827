/** A small chat page that shows what an app does: ask, show the stream, observe the answer. */

import { connect } from "./understudy.js";

const $ = (id) => document.getElementById(id);
const user = (localStorage.understudyUser ??= `try-${Math.random().toString(36).slice(2)}`);
const { observe } = connect({ url: "/v1" });
let messages = [];
let session = newSession();

const headers = () => ({
  "content-type": "application/json",
  ...($("key").value && { authorization: `Bearer ${$("key").value}` }),
});

async function showRoutes() {
  const said = await fetch("/v1/models", { headers: headers() });
  const found = said.ok ? (await said.json()).data.map((model) => model.id) : [];
  $("route").replaceChildren(...found.map((name) => new Option(name)));
}

async function ask(text) {
  show(text);
  messages.push({ role: "user", content: text });
  await reply();
}

/** Ask for an answer to the conversation as it stands, and show it as it comes. */
async function reply() {
  const article = $("answer").content.firstElementChild.cloneNode(true);
  const place = article.querySelector(".text");
  $("talk").append(article);
  article.scrollIntoView({ block: "end" });
  let know;
  const answer = observe(place, new Promise((resolve) => (know = resolve)));
  const turn = { role: "assistant", content: "" };
  try {
    const said = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { ...headers(), "x-understudy-session": session, "x-understudy-user": user },
      body: JSON.stringify({ model: $("route").value, messages, stream: true }),
    });
    if (!said.ok) throw new Error((await said.json()).error.message);
    const token = said.headers.get("x-understudy-feedback-token");
    let responseId;
    for await (const chunk of events(said.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (!responseId) know({ responseId: (responseId = chunk.id), token });
      place.textContent = turn.content += chunk.choices?.[0]?.delta?.content ?? "";
    }
    messages.push(turn);
    buttons(article, place, answer, turn);
    follow(responseId, token);
  } catch (error) {
    place.classList.add("error");
    place.textContent += ` ${error.message}`;
    answer.stop();
  }
}

function buttons(article, place, answer, turn) {
  const press = (what, on) => article.querySelector(`[data-do=${what}]`).setAttribute("aria-pressed", on);
  const acts = {
    up: () => vote(true),
    down: () => vote(false),
    async copy() {
      await navigator.clipboard.writeText(place.innerText);
      answer.copied();
    },
    edit() {
      const on = place.contentEditable !== "true";
      place.contentEditable = on;
      press("edit", on);
      if (on) place.focus();
      else turn.content = place.innerText; // the conversation goes on from the edited answer
    },
    async again() {
      messages = messages.slice(0, messages.indexOf(turn));
      article.querySelectorAll("button").forEach((button) => (button.disabled = true));
      await send(reply);
    },
  };
  const vote = (up) => {
    answer.thumb(up);
    press("up", up);
    press("down", !up);
  };
  article.addEventListener("click", (event) => acts[event.target.dataset?.do]?.());
}

/** Show what the gateway has heard of the last answers. */
const followed = new Map();
function follow(responseId, token) {
  followed.set(responseId, token);
  if (followed.size > 5) followed.delete(followed.keys().next().value);
}

async function showHeard() {
  const rows = [];
  for (const [responseId, token] of followed) {
    const said = await fetch(`/v1/feedback/${encodeURIComponent(responseId)}`, {
      headers: { "x-understudy-feedback-token": token },
    });
    if (!said.ok) continue;
    const { signals, reward } = await said.json();
    for (const signal of signals) rows.unshift([signal, responseId, reward]);
  }
  if (!rows.length) return;
  $("heard").replaceChildren(
    ...rows.map(([signal, responseId, reward]) => {
      const row = document.createElement("li");
      const kind = document.createElement("b");
      kind.textContent = signal.kind;
      const mean = signal.mean === null ? "" : ` ${signal.count > 1 ? "mean " : ""}${Number(signal.mean.toFixed(2))}`;
      const times = signal.count > 1 ? ` × ${signal.count}` : "";
      const worth = reward.so_far === null ? "no evidence yet" : `reward so far ${reward.so_far.toFixed(2)}`;
      row.append(kind, `${times}${mean}, of answer …${responseId.slice(-6)}: ${worth}`);
      return row;
    }),
  );
}

/** The chunks of a stream of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let piece; !(piece = await reader.read()).done; ) {
    const parts = (rest + piece.value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (part.startsWith("data:") && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function show(text) {
  const turn = document.createElement("p");
  turn.className = "user";
  turn.textContent = text;
  $("talk").querySelector(".hint")?.remove();
  $("talk").append(turn);
}

/** Run `act` with the form closed. */
async function send(act) {
  const button = $("ask").querySelector("button");
  button.disabled = true;
  await act();
  button.disabled = false;
}

function newSession() {
  return `try-${Math.random().toString(36).slice(2)}`;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  $("text").value = "";
  if (text) send(() => ask(text));
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("new").addEventListener("click", () => {
  messages = [];
  session = newSession();
  $("talk").replaceChildren();
});
$("key").addEventListener("change", showRoutes);
setInterval(showHeard, 2000);
showRoutes();
