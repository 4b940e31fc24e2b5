"use strict";
const $ = (id) => document.getElementById(id);
let model = null;      // what /v1/models says
let conversation = [];         // {role, content}
let identity = null;   // {id, title}: how this conversation is kept; null before its first message
let running = null;    // the AbortController of the answer that is being made
let editing = -1;      // the message that is being edited
let retry = null;      // what the Retry button does

const touch = matchMedia("(pointer: coarse)").matches;
const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

// -- what is shown --

function show() {
  const place = $("messages"), chat = model !== null && (model.has_chat_template || asksAboutImage());
  place.className = chat ? "" : "document";
  while (place.children.length > conversation.length) place.lastChild.remove();
  conversation.forEach((message, i) => {
    const box = place.children[i] || place.appendChild(newBox());
    box.className = "message " + message.role;
    box.firstChild.textContent = message.role === "user" ? "You" : "Model";
    showText(box.children[1], message, chat && message.role === "assistant");
    showImage(box, message, conversation[i - 1]?.content);
    showTools(box.lastChild, message, i);
  });
  const idle = running === null && model !== null, some = conversation.length > 0;
  $("send").disabled = $("draw").disabled = $("attach").disabled = !idle;
  $("send").hidden = running !== null;
  $("halt").hidden = running === null;
  $("empty").hidden = some;
  $("actions").hidden = !some || running !== null;
  $("undo").disabled = $("again").disabled = $("branch").disabled = $("reset").disabled = !idle || !some;
  $("again").disabled ||= conversation.at(-1)?.role !== "assistant";
}

function newBox() {
  const box = document.createElement("article");
  for (const [name, kind] of [["h2", ""], ["div", "text"], ["div", "tools"]]) {
    box.append(Object.assign(document.createElement(name), {className: kind}));
  }
  return box;
}

function showText(place, message, markdown) {
  if (place.shown === message.content && place.formatted === markdown) return;
  place.shown = message.content;
  place.formatted = markdown;
  place.className = markdown ? "text markdown" : "text";
  if (markdown) renderMarkdown(place, message.content);
  else place.textContent = message.content;
}

function showTools(place, message, i) {
  const own = message.role === "user", idle = running === null && editing < 0;
  if (place.children.length === 0) place.append(copyButton("copy", "Copy", () => conversation[i].content));
  let edit = place.querySelector(".edit");
  if (own && !edit) {
    edit = place.appendChild(Object.assign(document.createElement("button"), {type: "button", className: "edit", textContent: "Edit"}));
    edit.addEventListener("click", () => beginEdit(i));
  }
  if (!own && edit) edit.remove();
  else if (edit) edit.disabled = !idle;
}

function scrollDown() {
  $("conversation").scrollTop = $("conversation").scrollHeight;
}

function bytes(n) {
  return n < 1000 ? n + " bytes" : n < 1e6 ? (n / 1e3).toFixed(1) + " KB" : (n / 1e6).toFixed(2) + " MB";
}

function report(tokens, seconds, usage) {
  const parts = [tokens + (tokens === 1 ? " token" : " tokens")];
  if (seconds > 0 && tokens > 1) parts.push(((tokens - 1) / seconds).toFixed(1) + " tokens a second");
  if (usage) {
    const cached = (usage.prompt_tokens_details || {}).cached_tokens || 0;
    parts.push("read " + (usage.prompt_tokens - cached) + " of " + usage.prompt_tokens + " prompt tokens");
  }
  parts.push("memory of the conversation " + bytes(model.state_bytes));
  $("status").textContent = parts.join(" · ");
}

function complain(text, again) {
  $("error").textContent = text;
  $("problem").hidden = text === "";
  $("retry").hidden = !again;
  retry = again || null;
}

function inPlainWords(error) {
  if (error instanceof TypeError) return "The server does not answer. It may have been stopped, or the connection is gone.";
  return error.message;
}

async function refusal(response) {
  if (response.status === 401) return "The server wants its key; reload the page to enter it.";
  const said = await response.json().catch(() => ({}));
  const reason = (said.error && (said.error.message || said.error)) || "";
  if (response.status === 503) return "The server is busy or stopping" + (reason ? ": " + reason : ".");
  return reason ? String(reason) : "The server could not answer (" + response.status + ").";
}

function ask(text, yes) {
  $("question-text").textContent = text;
  $("yes").textContent = yes;
  $("question").showModal();
  return new Promise((done) => {
    // At once: the dialog's own event comes later, perhaps when it asks the next question.
    $("yes").onclick = () => done(true);
    $("no").onclick = $("question").oncancel = () => done(false);
  });
}

// -- an answer --

function settings() {
  const body = {};
  for (const name of SAMPLING) {
    const field = $(name);
    if (!field.checkValidity()) throw new Error(field.labels[0].textContent + ": " + field.validationMessage);
    const always = name === "temperature" || name === "max_tokens";
    if (field.value !== "" && (always || field.value !== field.defaultValue)) body[name] = Number(field.value);
  }
  const escapes = {n: "\n", t: "\t", "\\": "\\"};  // as of the command line's --stop
  if ($("stop").value) body.stop = $("stop").value.replace(/\\([nt\\])/g, (whole, name) => escapes[name]);
  return body;
}

function request() {
  const body = {...settings(), model: model.id, stream: true, stream_options: {include_usage: true}};
  const read = conversation.filter((message) => !message.drawn);
  if (!model.has_chat_template && !asksAboutImage())  // it continues the text, as it stands
    return ["v1/completions", {...body, prompt: read.map((m) => m.content).join("")}];
  const system = model.has_chat_template ? $("system").value.trim() : "";
  const messages = system ? [{role: "system", content: system}, ...read] : read;
  return ["v1/chat/completions", {...body, messages: messages.map(asPart)}];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    buffer += value;
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;  // a keep-alive comment
      if (block === "data: [DONE]") return;
      yield JSON.parse(block.slice(6));
    }
  }
}

// True if something was answered. `onFailure` is what Retry does.
async function answer(onFailure) {
  complain("");
  let path, body;
  try {
    [path, body] = request();
  } catch (error) {
    complain(error.message);
    return false;
  }
  const message = {role: "assistant", content: ""};
  conversation.push(message);
  running = new AbortController();
  $("status").textContent = "reading …";
  show();
  scrollDown();
  let tokens = 0, begin = 0, usage = null, finished = false;
  try {
    const response = await fetch(path, {
      method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message || String(event.error));
      if (event.usage) usage = event.usage;
      const choice = event.choices[0];
      if (!choice) continue;
      const text = choice.text ?? (choice.delta || {}).content ?? "";
      if (choice.finish_reason) finished = true;
      if (!text) continue;
      if (tokens++ === 0) begin = performance.now();
      message.content += text;
      showSoon();
      report(tokens, (performance.now() - begin) / 1000);
    }
    if (!finished) throw new Error("The server ended the answer early.");
  } catch (error) {
    if (error.name !== "AbortError") complain(inPlainWords(error), message.content === "" ? onFailure : again);
    if (message.content === "") conversation.pop();
  }
  running = null;
  report(usage ? usage.completion_tokens : tokens, (performance.now() - begin) / 1000, usage);
  const atEnd = isAtEnd();
  show();
  if (atEnd) scrollDown();
  const answered = conversation.at(-1) === message;
  if (answered) $("spoken").textContent = message.content;
  await keepNow();
  return answered;
}

function isAtEnd() {
  const place = $("conversation");
  return place.scrollHeight - place.scrollTop - place.clientHeight < 80;
}

let drawing = false;
function showSoon() {  // Markdown is made anew for each picture, not for each token
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    const atEnd = isAtEnd();
    show();
    if (atEnd) scrollDown();
  });
}

const send = () => post(false);

async function post(drawn) {
  const text = $("input").value, goesOn = model && !model.has_chat_template && conversation.length > 0 && !drawn && !attached
    && !asksAboutImage();
  if (running || !model || editing >= 0 || (text === "" && !goesOn)) return;
  const image = drawn ? null : attached;
  if (text !== "") conversation.push({role: "user", content: text, ...(image && {image}), ...(drawn && {drawn})});
  $("input").value = "";
  if (!drawn) attach(null);
  grow();
  focusInput();
  keepNow();
  const answered = drawn ? await drawAnswer(() => post(true)) : await answer(send);
  if (!answered && text !== "") {  // nothing came: the text can be sent again, before what was typed meanwhile
    conversation.pop();
    if (image && !attached) attach(image);
    $("input").value = text + ($("input").value && "\n" + $("input").value);
    grow();
    show();
    await keepNow();
  }
}

function focusInput() {
  $("input").focus({preventScroll: true});
}

function undo() {
  if (running || conversation.length === 0) return;
  conversation.pop();
  if (conversation.at(-1) && conversation.at(-1).role === "user") {
    const taken = conversation.pop();
    $("input").value = taken.content;
    if (taken.image) attach(taken.image);
  }
  $("status").textContent = "";
  complain("");
  grow();
  show();
  focusInput();
  keepNow();
}

async function again() {
  if (running || conversation.at(-1)?.role !== "assistant") return;
  const old = conversation.pop();
  show();
  focusInput();
  if (!(await (old.drawn ? drawAnswer : answer)(again))) {
    conversation.push(old);
    show();
  }
}

function beginEdit(i) {
  editing = i;
  const box = $("messages").children[i], area = document.createElement("textarea"), row = document.createElement("div");
  area.value = conversation[i].content;
  area.setAttribute("aria-label", "Edited message");
  row.className = "row";
  const end = (text) => {
    editing = -1;
    area.remove();
    row.remove();
    box.children[1].hidden = box.lastChild.hidden = false;
    if (text) {
      const {image, drawn} = conversation[i];
      if (image) attach(image);
      conversation.length = i;
      const typed = $("input").value;
      $("input").value = text;
      post(Boolean(drawn));
      $("input").value = typed;
      grow();
    } else {
      show();
      box.querySelector(".edit").focus();
    }
  };
  for (const [label, kind, act] of [["Send", "main", () => area.value && end(area.value)], ["Cancel", "", () => end("")]]) {
    const button = Object.assign(document.createElement("button"), {type: "button", className: kind, textContent: label});
    button.addEventListener("click", act);
    row.append(button);
  }
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); end(""); }
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch && area.value) { event.preventDefault(); end(area.value); }
  });
  box.children[1].hidden = box.lastChild.hidden = true;
  box.append(area, row);
  show();
  area.focus();
}

const wholeText = () => conversation.map((message) => message.content).join("");

function rewrite() {
  $("input").value = wholeText() + $("input").value;
  conversation = [];
  show();
  grow();
  focusInput();
}

// -- conversations that are kept --

function titleOf(messages) {
  return (messages.find((m) => m.role === "user") || {content: ""}).content.trim().replace(/\s+/g, " ").slice(0, 60) || "Conversation";
}

async function keepNow() {
  if (conversation.length === 0) {
    if (identity) await forget(identity.id);
    identity = null;
    return;
  }
  identity ??= {id: newId(), title: titleOf(conversation)};
  await keep({...identity, model: model.id, system: $("system").value, messages: conversation, changed: Date.now()});
  sessionStorage.setItem("conversation", identity.id);
  if (!$("list").hidden) await showList();
}

function newId() {  // randomUUID is for pages with TLS or of this machine
  return [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");
}

function open(entry) {
  conversation = entry ? entry.messages.slice() : [];
  identity = entry ? {id: entry.id, title: entry.title} : null;
  if (entry && !$("system").disabled) $("system").value = entry.system;
  if (!entry) sessionStorage.removeItem("conversation");
  else sessionStorage.setItem("conversation", entry.id);
  editing = -1;
  $("messages").replaceChildren();
  $("status").textContent = $("spoken").textContent = "";
  complain("");
  show();
  scrollDown();
  if (!$("list").hidden) showList();
}

async function showList() {
  const entries = await kept();
  $("none").hidden = entries.length > 0;
  $("conversations").replaceChildren(...entries.map((entry) => {
    const row = document.createElement("li");
    const open_ = Object.assign(document.createElement("button"), {type: "button", className: "open"});
    open_.textContent = entry.title + " · " + new Date(entry.changed).toLocaleString();
    if (identity && entry.id === identity.id) open_.setAttribute("aria-current", "true");
    open_.addEventListener("click", () => { if (!running) { open(entry); closePanels(); focusInput(); } });
    const away = Object.assign(document.createElement("button"), {type: "button", textContent: "Delete"});
    away.setAttribute("aria-label", "Delete " + entry.title);
    away.addEventListener("click", async () => {
      if (running || !(await ask("Delete “" + entry.title + "”? It cannot be brought back.", "Delete"))) return;
      await forget(entry.id);
      if (identity && entry.id === identity.id) open(null);
      else await showList();
    });
    row.append(open_, away);
    return row;
  }));
}

async function startNew() {
  if (running || conversation.length === 0) return;
  if (!(await ask("Start a new conversation? This one stays under Chats.", "Start"))) return;
  await keepNow();
  open(null);
  focusInput();
}

async function branch() {
  if (running || conversation.length === 0) return;
  await keepNow();
  identity = {id: newId(), title: identity.title.replace(/ \(branch\)$/, "") + " (branch)"};
  await keepNow();
  $("status").textContent = "This is a copy now; the conversation it was taken from stays under Chats.";
}

async function load(file) {
  if (!file || running) return;
  try {
    const saved = await readFile(file);
    await keepNow();
    open({id: newId(), title: titleOf(saved.messages), ...saved});
    await keepNow();
    closePanels();
  } catch (error) {
    complain(error.message);
  }
}

// -- the page's controls --

function togglePanel(name, button) {
  const opens = $(name).hidden;
  closePanels();
  $(name).hidden = !opens;
  $(button).setAttribute("aria-expanded", String(opens));
  if (opens && name === "list") showList();
}

function closePanels() {
  for (const [name, button] of [["list", "list-toggle"], ["settings", "toggle"]]) {
    $(name).hidden = true;
    $(button).setAttribute("aria-expanded", "false");
  }
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = Math.max(44, input.scrollHeight + 2) + "px";
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) halt();
  else if (event.altKey && event.code === "KeyZ") { event.preventDefault(); undo(); }
  else if (event.altKey && event.code === "KeyR") { event.preventDefault(); again(); }
});
function halt() {
  if (running) running.abort();
  focusInput();
}
listenForImages();
$("undo").addEventListener("click", undo);
$("again").addEventListener("click", again);
$("halt").addEventListener("click", halt);
$("rewrite").addEventListener("click", rewrite);
$("branch").addEventListener("click", branch);
$("save").addEventListener("click", () => saveFile({title: titleOf(conversation), model: model.id, system: $("system").value, messages: conversation}));
$("load").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { load($("file").files[0]); $("file").value = ""; });
$("reset").addEventListener("click", startNew);
$("toggle").addEventListener("click", () => togglePanel("settings", "toggle"));
$("list-toggle").addEventListener("click", () => togglePanel("list", "list-toggle"));
$("retry").addEventListener("click", () => { const act = retry; complain(""); focusInput(); if (act) act(); });

function hint() {
  const keys = touch
    ? "Tap Send to send; Stop takes its place while the model answers."
    : "Enter sends, Shift+Enter starts a line, Esc stops an answer. Alt+Z undoes, Alt+R answers again.";
  const memory = "All that the model remembers takes " + bytes(model.state_bytes) + ", however long the conversation is.";
  const paragraphs = [keys, memory].map((text) => Object.assign(document.createElement("p"), {textContent: text}));
  $("empty").replaceChildren(...(model.examples ?? []).map(exampleButton), ...paragraphs);
}

function exampleButton(text) {
  const button = Object.assign(document.createElement("button"), {type: "button", className: "example", textContent: text});
  button.addEventListener("click", () => { $("input").value = text; grow(); focusInput(); });
  return button;
}

function showDefaults() {
  const known = {temperature: model.temperature, top_p: model.top_p ?? 1, top_k: model.top_k ?? 0, min_p: model.min_p ?? 0,
    repetition_penalty: model.repetition_penalty ?? 1, max_tokens: Math.min(512, model.max_tokens)};
  for (const [name, value] of Object.entries(known)) $(name).value = $(name).defaultValue = value;
  $("max_tokens").max = model.max_tokens;
  $("seed").placeholder = $("stop").placeholder = "none";
}

async function start() {
  complain("");
  try {
    const response = await fetch("v1/models");
    if (!response.ok) throw new Error(await refusal(response));
    model = (await response.json()).data[0];
  } catch (error) {
    complain(inPlainWords(error), start);
    return;
  }
  $("model").textContent = $("model").title = model.id;
  showDefaults();
  offerImages();
  hint();
  if (!model.has_chat_template) {
    $("input-label").textContent = "Text (this model has no chat template: it continues what you write)";
    $("input-label").className = "needed";
    $("system").disabled = true;
    $("system").placeholder = "needs a model with a chat template";
    $("send").textContent = "Continue";
    $("rewrite").hidden = false;
    $("rewrite").after(copyButton("copy-text", "Copy", wholeText));
  }
  const id = sessionStorage.getItem("conversation");
  const entries = await kept();
  open(entries.find((entry) => entry.id === id) || (id ? null : entries.find((entry) => entry.model === model.id)) || null);
}
addEventListener("pagehide", () => { if (running) keepNow(); });
start();
