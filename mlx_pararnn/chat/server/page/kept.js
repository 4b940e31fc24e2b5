"use strict";
// Conversations in this browser's IndexedDB, and as files. Where a browser keeps nothing (a private window), they last
// as long as the page.

const FORMAT = "mlx-pararnn-conversation";

function database() {
  database.opened ??= new Promise((done, failed) => {
    const request = indexedDB.open("mlx-pararnn", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", {keyPath: "id"});
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
  return database.opened;
}

async function inStore(mode, action) {
  try {
    const store = (await database()).transaction("conversations", mode).objectStore("conversations");
    const request = action(store);
    return await new Promise((done, failed) => {
      request.onsuccess = () => done(request.result);
      request.onerror = () => failed(request.error);
    });
  } catch {
    return undefined;
  }
}

// {id, title, model, system, messages: [{role, content, image: a data URL, drawn: by Draw}], changed: milliseconds}
const keep = (conversation) => inStore("readwrite", (store) => store.put(conversation));
const forget = (id) => inStore("readwrite", (store) => store.delete(id));
const kept = async () => ((await inStore("readonly", (store) => store.getAll())) || []).sort((a, b) => b.changed - a.changed);

function saveFile(conversation) {
  const {title, model, system, messages} = conversation;
  const text = JSON.stringify({format: FORMAT, version: 1, title, model, system, messages}, null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = (title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "conversation") + ".json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function asKept({role, content, image, drawn}) {
  const sound = typeof image === "string" && /^data:image\/(png|jpeg);base64,[A-Za-z0-9+/=]+$/.test(image);
  return {role, content, ...(sound && {image}), ...(drawn === true && {drawn})};
}

async function readFile(file) {
  let saved;
  try {
    saved = JSON.parse(await file.text());
  } catch {
    throw new Error(file.name + " is not a conversation that this page has saved.");
  }
  const messages = Array.isArray(saved) ? saved : saved && saved.messages;
  const sound = Array.isArray(messages) && messages.every((m) =>
    m && ["user", "assistant", "system"].includes(m.role) && typeof m.content === "string");
  if (!sound) throw new Error(file.name + " is not a conversation that this page has saved.");
  const system = typeof saved.system === "string" ? saved.system : (messages.find((m) => m.role === "system") || {}).content;
  return {system: system || "", messages: messages.filter((m) => m.role !== "system").map(asKept)};
}
