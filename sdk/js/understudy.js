/**
 * Hears what people do with an answer and tells the gateway. One module, no dependencies; types in understudy.d.ts.
 *
 *     import { connect } from "./understudy.js";
 *     const { observe } = connect({ url: "https://gateway.example/v1" });
 *     const answer = observe(element, { responseId, token });
 *     button.onclick = () => answer.thumb(true);
 *
 * Nothing here throws into the page or makes it wait: what is said goes out in batches, again if the gateway is busy or
 * away, and outlives the page. Bodies are text/plain and hold the token, so that no preflight is asked first.
 */

const SOON = 400; // ms in which more may be said before a batch goes out
const LIMIT = 60_000; // bytes of a batch; browsers let 64 KiB outlive a page
const MOST = 1000; // items that wait while the gateway is away
const TRIES = 6;
const AFTER = [5, 30, 120]; // seconds after an answer's first edit at which it is looked at again

/** A client of one gateway. `url`: its base URL, ends with /v1; `user`: who speaks; `key`: an API key, not in pages. */
export function connect({ url = "/v1", user, key } = {}) {
  const to = `${url}/feedback`;
  let waiting = []; // JSON, so that what cannot be sent fails alone
  let timer;
  let tried = 0;

  const later = (wait) => {
    timer ??= setTimeout(flush, wait);
  };

  const send = (kind, item) => {
    const event_id = item.event_id ?? id();
    safely(() => {
      waiting.push(JSON.stringify({ kind, user, at: Date.now() / 1000, ...item, event_id }));
      waiting = waiting.slice(-MOST);
      later(SOON);
    })();
    return event_id;
  };

  /** Send what waits. Resolves to whether nothing is left to send. */
  async function flush() {
    clearTimeout(timer);
    timer = undefined;
    const batches = [];
    let room = 0;
    for (const item of waiting) {
      const size = new Blob([item]).size + 1;
      if (size > room) {
        batches.push([]);
        room = LIMIT;
      }
      room -= size;
      batches.at(-1).push(item);
    }
    waiting = [];
    const left = (await Promise.all(batches.map(post))).flat();
    tried = left.length ? tried + 1 : 0;
    if (left.length && tried < TRIES) {
      waiting = [...left, ...waiting];
      later(2 ** tried * 500 * (0.5 + Math.random()));
    }
    return !waiting.length;
  }

  /** What of a batch has to be sent again. */
  async function post(batch) {
    const body = `[${batch}]`;
    const headers = { "content-type": "text/plain" };
    if (key) headers.authorization = `Bearer ${key}`;
    try {
      const said = await fetch(to, { method: "POST", keepalive: true, headers, body });
      if (said.status === 202 && said.headers.get("retry-after")) {
        return (await said.json()).errors.filter((e) => e.status === 429).map((e) => batch[e.index]);
      }
      return said.status === 429 || said.status >= 500 ? batch : [];
    } catch {
      return !key && hidden() && navigator.sendBeacon?.(to, body) ? [] : batch; // no `keepalive` while a page goes away
    }
  }

  addEventListener("pagehide", flush);
  document.addEventListener("visibilitychange", () => hidden() && flush());

  const votes = (about) => ({
    thumb: (up, more) => send("thumb", { ...about(), value: !!up, ...more }),
    rate: (value, more) => send("rating", { ...about(), value, ...more }),
    correct: (text, more) => send("correction", { ...about(), text: cut(text), ...more }),
    compare: (winner, loser, more) => send("comparison", { ...about(), value: { winner, loser }, ...more }),
    send: (kind, more) => send(kind, { ...about(), ...more }),
  });

  return { ...votes(() => ({})), flush, observe: (element, about) => observe(element, about, votes, send) };
}

/** Hear what is done with the answer that `element` shows, or is still being written into. */
function observe(element, about, votes, send) {
  let named = typeof about?.then === "function" ? null : about;
  const early = []; // heard before the answer has a name
  const leave = new AbortController();
  const on = (target, kinds, act) => {
    for (const kind of kinds) target.addEventListener(kind, safely(act), { signal: leave.signal, passive: true });
  };
  const text = () => element.value ?? element.innerText ?? "";
  const item = () => ({ response_id: named?.responseId, token: named?.token });
  const say = (kind, more) => {
    const heard = { at: Date.now() / 1000, ...more };
    named ? send(kind, { ...item(), ...heard }) : early.push([kind, heard]);
  };
  Promise.resolve(about).then((known) => {
    named = known;
    for (const [kind, heard] of early.splice(0)) say(kind, heard);
  }, () => {});

  // How long it is on the screen of a page that is looked at. Said each time the page is left; the last one counts.
  const dwell = id();
  let seen = 0;
  let since = null;
  let onScreen = false;
  const look = () => {
    const now = performance.now();
    if (since !== null) seen += (now - since) / 1000;
    since = onScreen && !hidden() ? now : null;
  };
  const watch = new IntersectionObserver((entries) => {
    onScreen = entries.at(-1).isIntersecting;
    look();
  });
  watch.observe(element);

  // How long until something is done with it.
  const began = performance.now();
  let acted = false;
  const act = () => {
    if (!acted) say("first_action", { value: (performance.now() - began) / 1000 });
    acted = true;
  };
  on(element, ["pointerdown", "keydown"], act);
  on(document, ["selectionchange"], () => {
    const chosen = getSelection();
    if (!chosen.isCollapsed && chosen.containsNode(element, true)) act();
  });

  // How much of it is copied, and whether that is code.
  const copied = (share = 1, part) => {
    const value = Math.min(1, share || 0);
    if (value) say("copy", { value, target: part || (value > 0.9 ? "whole" : "part") });
  };
  on(document, ["copy"], () => {
    const chosen = getSelection();
    const { activeElement } = document;
    const field = activeElement === element && element.value?.slice(element.selectionStart, element.selectionEnd);
    if (!field && !(chosen.rangeCount && chosen.containsNode(element, true))) return;
    const code = chosen.anchorNode?.parentElement?.closest("pre, code");
    act();
    copied(
      plain(field || within(chosen, element)).length / plain(field ? element.value : element.textContent).length,
      code && element.contains(code) && code.contains(chosen.focusNode) && "code",
    );
  });

  // What is left of it some time after it was first edited in place.
  let before;
  let edits;
  let told = false;
  const edited = (after) => {
    const now = text();
    const value = survived(before, now);
    if (value < 1 || told) say("edit", { value, text: cut(now), target: { after } });
    told = true;
  };
  on(element, ["beforeinput"], () => {
    before ??= text();
  });
  on(element, ["input"], () => {
    act();
    before ??= "";
    edits ??= { at: performance.now(), timers: AFTER.map((s) => setTimeout(safely(() => edited(s)), s * 1000)) };
  });

  const leaving = safely(() => {
    look();
    if (seen >= 0.1) say("dwell", { value: seen, event_id: dwell });
    const after = edits && (performance.now() - edits.at) / 1000;
    if (after < AFTER.at(-1)) edited(after);
  });
  on(window, ["pagehide"], leaving);
  on(document, ["visibilitychange"], () => (hidden() ? leaving() : look()));

  return {
    ...votes(item),
    /** For an app's own copy button. `share`: of the answer, 0 to 1; `part`: whole, part or code. */
    copied: safely(copied),
    accept: (more) => say("accept", more),
    /** The answer is no longer shown. */
    stop() {
      leaving();
      watch.disconnect();
      leave.abort();
      edits?.timers.forEach(clearTimeout);
    },
  };
}

const hidden = () => document.visibilityState === "hidden";
const id = () => crypto.randomUUID?.() ?? `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;
const cut = (text) => String(text).slice(0, 15_000); // a batch outlives its page whatever the script
const plain = (text) => text.replace(/\s+/g, " ").trim();

/** `act`, whose failure is nobody's business but ours. */
const safely = (act) => (...args) => {
  try {
    act(...args);
  } catch {}
};

/** What of the selection stands in the element. */
function within(chosen, element) {
  const range = chosen.getRangeAt(0).cloneRange();
  const all = document.createRange();
  all.selectNodeContents(element);
  if (range.compareBoundaryPoints(Range.START_TO_START, all) < 0) range.setStart(all.startContainer, all.startOffset);
  if (range.compareBoundaryPoints(Range.END_TO_END, all) > 0) range.setEnd(all.endContainer, all.endOffset);
  return range.toString();
}

/** How much of `before` still stands at the two ends of `now`, 0 to 1. */
function survived(before, now) {
  const most = Math.min(before.length, now.length);
  let head = 0;
  let tail = 0;
  while (head < most && before[head] === now[head]) head++;
  while (tail < most - head && before.at(-1 - tail) === now.at(-1 - tail)) tail++;
  return (head + tail) / Math.max(before.length, now.length, 1);
}
