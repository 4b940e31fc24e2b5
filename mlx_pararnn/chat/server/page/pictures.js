"use strict";
// Images: one that the next message asks about, those of messages, and drawings. Nothing of this is shown for models
// that neither see nor draw.

const LARGEST = 512;   // pixels on a side of what is sent; the model sees fewer
let attached = null;   // the data URL of the image that the next message asks about

function attach(url) {
  attached = url || null;
  $("attached").hidden = attached === null;
  $("attached").firstChild.src = attached || "data:,";
}

async function attachFile(file) {
  if (!file || !model || !model.sees) return;
  try {
    attach(await asDataURL(file));
    complain("");
  } catch {
    complain((file.name || "This") + " is not an image that this browser can open.");
  }
  focusInput();
}

async function asDataURL(file) {
  const bitmap = await createImageBitmap(file);  // as EXIF turns it
  const share = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas"), place = canvas.getContext("2d");
  canvas.width = Math.max(1, Math.round(share * bitmap.width));
  canvas.height = Math.max(1, Math.round(share * bitmap.height));
  place.fillStyle = "white";
  place.fillRect(0, 0, canvas.width, canvas.height);
  place.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return share < 1 ? canvas.toDataURL("image/jpeg", 0.92) : canvas.toDataURL("image/png");
}

const imageIn = (data) => [...(data ? data.files : [])].find((file) => file.type.startsWith("image/"));

function showImage(place, message, prompt) {
  let image = place.querySelector(".picture");
  if (!message.image) {
    if (image) image.remove();
    return;
  }
  image ||= place.insertBefore(new Image(), place.lastChild);
  image.className = message.drawn ? "picture drawn" : "picture";
  image.alt = message.drawn ? "Drawing: " + prompt : "Attached image";
  if (image.src !== message.image) image.src = message.image;
}

// What a chat's request says of a message. Drawings are no part of what the model reads.
function asPart({role, content, image}) {
  if (!image) return {role, content};
  return {role, content: [{type: "image_url", image_url: {url: image}}, {type: "text", text: content}]};
}

const asksAboutImage = () => conversation.some((message) => message.image && !message.drawn);

// As `answer`, for a picture of what the last message says.
async function drawAnswer(onFailure) {
  complain("");
  const message = {role: "assistant", content: "", drawn: true}, prompt = conversation.at(-1).content;
  const body = {model: model.id, prompt, response_format: "b64_json"};
  if ($("seed").value !== "" && $("seed").checkValidity()) body.seed = Number($("seed").value);
  conversation.push(message);
  running = new AbortController();
  $("status").textContent = "drawing …";
  show();
  scrollDown();
  try {
    const response = await fetch("v1/images/generations", {
      method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    message.image = "data:image/png;base64," + (await response.json()).data[0].b64_json;
  } catch (error) {
    if (error.name !== "AbortError") complain(inPlainWords(error), onFailure);
    conversation.pop();
  }
  running = null;
  const drawn = conversation.at(-1) === message;
  $("status").textContent = "";
  show();
  scrollDown();
  if (drawn) $("spoken").textContent = "The picture is drawn.";
  await keepNow();
  return drawn;
}

function offerImages() {
  $("attach").hidden = !model.sees;
  $("draw").hidden = !model.draws;
}

function listenForImages() {
  $("attach").addEventListener("click", () => $("image").click());
  $("image").addEventListener("change", () => { attachFile($("image").files[0]); $("image").value = ""; });
  $("detach").addEventListener("click", () => { attach(null); $("input").focus(); });
  $("draw").addEventListener("click", () => post(true));
  $("input").addEventListener("paste", (event) => {
    const file = imageIn(event.clipboardData);
    if (!file || !model || !model.sees) return;
    event.preventDefault();
    attachFile(file);
  });
  addEventListener("dragover", (event) => { if (model && model.sees) event.preventDefault(); });
  addEventListener("drop", (event) => {
    if (!model || !model.sees) return;
    event.preventDefault();
    attachFile(imageIn(event.dataTransfer));
  });
}
