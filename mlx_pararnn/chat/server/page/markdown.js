"use strict";
// Markdown of a model's answer as elements. The model's text is not trusted: what marked makes of it goes through
// DOMPurify, which leaves text, lists, tables, code and links; no image is loaded, and the page's policy runs no script.

const TAGS = ["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "del", "code", "pre", "blockquote",
  "ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td"];

function renderMarkdown(place, text) {
  const html = marked.parse(text, {gfm: true, breaks: true, async: false});
  const clean = DOMPurify.sanitize(html, {ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "start"], ALLOW_DATA_ATTR: false,
    ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i, RETURN_DOM_FRAGMENT: true});
  for (const link of clean.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const block of clean.querySelectorAll("pre")) {
    block.tabIndex = 0;  // it may scroll sideways
    block.after(copyButton("copy-code", "Copy code", () => block.textContent));
  }
  place.replaceChildren(clean);
}

function copyButton(name, label, text) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = name;
  button.textContent = label;
  button.addEventListener("click", async () => {
    button.textContent = (await copied(text())) ? "Copied" : "Not copied";
    setTimeout(() => { button.textContent = label; }, 1500);
  });
  return button;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {  // without TLS a browser has no clipboard for pages of other machines
    const area = document.createElement("textarea");
    area.value = text;
    (document.querySelector("dialog[open]") || document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
