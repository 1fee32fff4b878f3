"use strict";

const POLL_MS = 1000;
const TIMEOUT_MS = 5000;
const SEND_TIMEOUT_MS = 65000;
const NOTICE_MS = 10000;
const MEANINGS = {
  accept: "Accepts every message.",
  503: "Answers 503, as if it were down.",
  429: "Answers 429, as if it were overloaded.",
  slow: "",
  drop: "Drops the connection, no answer.",
};
const BREAKERS = {
  closed: "breaker closed",
  open: "breaker open",
  "half-open": "breaker half-open",
  none: "not used by the service",
  unknown: "breaker unknown",
};
const EXAMPLES = {
  buyer: {
    channels: "A buyer gets an email.",
    to: "buyer@example.com", title: "On its way", message: "Your order is on its way.",
  },
  seller: {
    channels: "A seller gets an email and a push notification.",
    to: "seller@example.com", title: "Sold", message: "Your bicycle is sold.",
  },
};

const $ = (id) => document.getElementById(id);
const form = $("form");
const providers = new Map();       // the <li> of each provider, by port
const notifications = new Map();   // the <li> of each notification, by key
let shown = "";                    // the state that was shown last
let saving = 0;                    // changes under way
let changes = 0;                   // changes ever begun: an older state must not undo one
let asked = 0, answered = 0;       // requests for the state: a late answer is outdated
let queue = Promise.resolve();
let isLost = false;
let noticeTimer;

// Content goes through textContent, and only where it differs: focus, scroll and selection stay.
function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function make(name, text, ...classes) {
  const element = document.createElement(name);
  element.textContent = text;
  element.classList.add(...classes.filter(Boolean));
  return element;
}

function copy(id) {
  return $(id).content.firstElementChild.cloneNode(true);
}

// A notice stays until the next one, or for `ms`.
function notify(text, ms = 0) {
  clearTimeout(noticeTimer);
  put($("notice"), text);
  if (ms) noticeTimer = setTimeout(notify, ms, "");
}

async function call(method, path, body, timeout = TIMEOUT_MS) {
  const options = { method, cache: "no-store", signal: AbortSignal.timeout(timeout) };
  if (body) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  const reply = await fetch(`sandbox/${path}`, options).catch(() => {
    throw new Error("the sandbox does not answer");
  });
  const text = await reply.text();
  if (!reply.ok) throw new Error(JSON.parse(text).error);
  return text;
}

// Changes run one after another: two at once could arrive in the other order.
function change(action) {
  saving += 1;
  changes += 1;
  queue = queue.then(async () => {
    try {
      await action();
      notify("");
    } catch (error) {
      notify(`This could not be changed: ${error.message}`, NOTICE_MS);
    }
    saving -= 1;
    shown = "";
    await refresh();
  });
}

// Providers.

function addProvider({ name, port }) {
  const item = copy("provider");
  const [group, delay] = [item.querySelector(".switch"), item.querySelector(".delay input")];
  put(item.querySelector("h3"), name);
  group.setAttribute("aria-label", `${name} answers`);
  delay.setAttribute("aria-label", `Seconds until ${name} accepts`);
  for (const radio of group.querySelectorAll("input")) radio.name = `provider-${port}`;
  item.addEventListener("change", () => saveProvider(item, port));
  delay.addEventListener("blur", () => { shown = ""; });   // it was left alone while it had the focus
  $("providers").append(item);
  providers.set(port, item);
  return item;
}

function saveProvider(item, port) {
  const delay = item.querySelector(".delay input");
  const body = { behaviour: item.querySelector(":checked").value };
  if (delay.checkValidity()) body.delay = delay.valueAsNumber;
  showBehaviour(item, body.behaviour);
  change(async () => {
    await call("PUT", `providers/${port}`, body);
    if (!delay.checkValidity()) throw new Error(`expected ${delay.min} to ${delay.max} seconds`);
  });
}

function showBehaviour(item, behaviour) {
  item.dataset.behaviour = behaviour;
  put(item.querySelector(".meaning"), MEANINGS[behaviour]);
  item.querySelector(".meaning").hidden = behaviour === "slow";
  item.querySelector(".delay").hidden = behaviour !== "slow";
}

function showProvider(provider) {
  const item = providers.get(provider.port) ?? addProvider(provider);
  const delay = item.querySelector(".delay input");
  const breaker = item.querySelector(".breaker");
  put(breaker, BREAKERS[provider.breaker]);
  breaker.dataset.state = provider.breaker;
  put(item.querySelector(".counts"), provider.received ? `${provider.accepted} of ${provider.received} accepted` : "no messages");
  item.querySelector(`[value="${provider.behaviour}"]`).checked = true;
  if (document.activeElement !== delay) delay.value = provider.delay;
  showBehaviour(item, provider.behaviour);
}

// Notifications.

function showNotifications(list) {
  const gone = new Set(notifications.keys());
  let next = $("notifications").firstElementChild;
  for (const notification of list) {
    gone.delete(notification.key);
    const item = notifications.get(notification.key) ?? copy("notification");
    notifications.set(notification.key, item);
    if (item === next) next = next.nextElementSibling;
    else $("notifications").insertBefore(item, next);
    fill(item, notification);
  }
  for (const key of gone) {
    notifications.get(key).remove();
    notifications.delete(key);
  }
}

// What to try: all steps while nothing has been sent, then only the next one.
function showSteps(state) {
  const done = stepsDone(state);
  $("steps").hidden = done === 3;
  $("nothing").hidden = done > 0;
  $("steps").querySelectorAll("li").forEach((step, index) => { step.hidden = done > 0 && index !== done; });
}

function stepsDone({ notifications: list, providers: known, reads_log }) {
  if (!list.length) return 0;
  const ways = list.flatMap(({ ways: each }) => each.map(({ steps }) => steps.map(({ tone }) => tone)));
  const isSkipped = reads_log
    ? ways.some((tones) => tones.includes("quiet"))
    : known.some(({ breaker }) => breaker === "open");
  if (isSkipped) return 3;
  return ways.some((tones) => tones.includes("bad") && tones.at(-1) === "good") ? 2 : 1;
}

function fill(item, notification) {
  const text = JSON.stringify(notification);
  if (item.shown === text) return;
  item.shown = text;
  const title = item.querySelector("h3");
  put(title, notification.title ?? (notification.may_have_arrived
    ? "Title unknown: none of the sandbox’s providers received it"
    : "No provider received it: title unknown"));
  title.classList.toggle("nothing", notification.title === null);
  if (notification.title === "") put(title, "No title");
  const result = item.querySelector(".result");
  put(result, [notification.result, notification.status].filter(Boolean).join(" "));
  result.dataset.tone = notification.tone;
  put(item.querySelector(".reason"), notification.reason ?? "");
  item.querySelector(".ways").replaceChildren(...notification.ways.map(makeWay));
  fillMeta(item, notification);
  fillDetails(item, notification);
}

function makeWay({ channel, steps }) {
  const way = make("li", "");
  const tried = make("span", "");
  way.append(make("span", `${channel}: `, "channel"), tried);
  steps.forEach(({ provider, text, tone }, index) => {
    if (index) tried.append(" ");
    const step = make("span", (index ? "→ " : "") + (provider ? `${provider}: ` : ""), "step");
    step.append(make("b", text));
    step.dataset.tone = tone;
    tried.append(step);
  });
  return way;
}

function fillMeta(item, notification) {
  const recipient = notification.recipient ?? (notification.is_logged ? "unknown recipient" : "");
  put(item.querySelector(".recipient"), recipient);
  const time = item.querySelector("time");
  time.dateTime = time.title = notification.at;
  put(time, new Date(notification.at).toLocaleTimeString());
  put(item.querySelector(".id"), notification.request_id);
}

function fillDetails(item, notification) {
  const { received } = notification;
  put(item.querySelector("summary"), received.length ? "What the providers received" : "Details");
  put(item.querySelector(".to bdi"), notification.to ?? "unknown");
  put(item.querySelector(".text"), notification.message ?? "unknown");
  put(item.querySelector(".whole-id"), notification.request_id || "none");
  item.querySelector(".received").replaceChildren(...received.map(makeReceived));
  put(item.querySelector(".source"), notification.is_logged ? "" : "From what the providers saw; no log line has come.");
}

function makeReceived({ provider, at, secret_key, answer }) {
  const line = make("li", "");
  line.append(make("b", provider), make("time", new Date(at).toLocaleTimeString()));
  line.append(make("span", answer), make("span", `secret key ${secret_key || "none"}`));
  line.querySelector("time").dateTime = at;
  return line;
}

// The form.

function showExample(isFirst = false) {
  const example = EXAMPLES[form.elements.recipient.value];
  const previous = Object.values(EXAMPLES).find((other) => other !== example);
  put($("channels"), example.channels);
  for (const name of ["to", "title", "message"]) {
    const field = form.elements[name];
    if (field.value === previous[name] || isFirst) field.value = example[name];
  }
}

let latest = 0;   // the last request of the form: only its answer is shown

async function send(event) {
  event.preventDefault();
  const number = ++latest;
  const fields = Object.fromEntries(new FormData(form));
  showSending();
  let content;
  try {
    const reply = call("POST", "notifications", fields, SEND_TIMEOUT_MS);
    refresh();   // it is under way
    content = makeAnswer(JSON.parse(await reply));
  } catch (error) {
    content = [make("p", `Failed: ${error.message}`, "error")];
  }
  if (number === latest) {
    $("answer").replaceChildren(...content);
    $("answer").setAttribute("aria-busy", "false");
  }
  await refresh();
}

// The previous answer keeps its room, so that what is below it does not jump.
function showSending() {
  const [first] = $("answer").children;
  if (first) first.replaceWith(make("p", "Sending…"));
  else $("answer").append(make("p", "Sending…"));
  $("answer").setAttribute("aria-busy", "true");
}

function makeAnswer({ status, reason, body, request_id }) {
  const line = make("p", "The service answered ");
  const code = make("b", `${status} ${reason}`);
  code.dataset.tone = status === 200 ? "good" : "bad";
  line.append(code);
  const id = make("p", "Request id ", "hint");
  id.append(make("code", request_id));
  return [line, make("pre", body.trim()), id];
}

// Keeping up to date.

async function refresh() {
  const before = changes;
  const number = ++asked;
  try {
    const text = await call("GET", "state");
    if (saving || before !== changes || number < answered) return;   // outdated
    answered = number;
    if (isLost) notify("");
    isLost = false;
    if (text !== shown) show(JSON.parse(text));
    shown = text;
  } catch {
    isLost = true;
    notify("The sandbox does not answer. This is its last known state. Trying again…");
  }
}

function show(state) {
  const words = state.service_answers ? "Service" : "No answer from the service at";
  put($("service"), `${words} ${state.service}`);
  $("service").dataset.tone = state.service_answers ? "good" : "bad";
  state.providers.forEach(showProvider);
  showNotifications(state.notifications);
  showSteps(state);
  $("unlogged").hidden = state.reads_log || !state.notifications.length;
}

async function poll() {
  if (!document.hidden) await refresh();
  setTimeout(poll, POLL_MS);
}

form.addEventListener("submit", send);
for (const radio of form.elements.recipient) radio.addEventListener("change", () => showExample());
$("clear").addEventListener("click", () => change(async () => {
  await call("DELETE", "notifications");
  $("answer").replaceChildren(make("p", "Cleared."));
}));
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
// There is room for the fields beside the list, as in the stylesheet.
const wide = matchMedia("(min-width: 60rem)");
const openTexts = () => { $("texts").open = wide.matches; };
wide.addEventListener("change", openTexts);
openTexts();
showExample(true);
poll();
