// The page: a prompt, one model or two beside each other, and what they share.

import { ask, unlock } from "./api.js";
import { inspect } from "./inspector.js";
import { Pane, hasHoles } from "./pane.js";
import { tokenByToken } from "./settings.js";

const part = (id) => document.getElementById(id);
const panes = [];

const page = {
  models: [],
  inspect,

  get prompt() {
    return part("prompt").value;
  },

  announce(text) {
    part("status").textContent = text;
  },

  /** A pane has other settings, or begins or ends to write. */
  changed() {
    const writing = panes.some((pane) => pane.run);
    const infills = panes.some((pane) => pane.infills);
    part("run").textContent = writing ? "Stop" : "Write";
    part("compare").disabled = writing;
    part("compare").setAttribute("aria-pressed", panes.length > 1);
    for (const id of ["hole", "holes"]) part(id).hidden = !infills;
  },

  /** Shows a refusal that is about the prompt or the key, and says whether it was one. */
  refused(error) {
    const key = error.status === 401;
    if (!key && !["prompt", "text"].includes(error.param)) return false;
    part("unlock").hidden = !key;
    part(key ? "key-error" : "prompt-error").textContent = error.message;
    part(key ? "key" : "prompt").setAttribute("aria-invalid", "true");
    part(key ? "key" : "prompt").focus();
    return true;
  },

  async copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      page.announce("Copied.");
    } catch {
      part("copy").querySelector("textarea").value = text; // where the page may not touch the clipboard
      part("copy").showModal();
      part("copy").querySelector("textarea").select();
    }
  },
};

async function open() {
  clear("prompt");
  try {
    page.models = (await ask("/v1/models")).data;
    addPane();
  } catch (error) {
    if (!page.refused(error)) part("prompt-error").textContent = error.message;
  }
}

function clear(id) {
  part(id).removeAttribute("aria-invalid");
  part(`${id}-error`).textContent = "";
}

function addPane() {
  const element = part("pane").content.firstElementChild.cloneNode(true);
  const own = (ids) => ids.split(" ").map((id) => `${id}-${panes.length + 1}`).join(" ");
  for (const name of ["id", "for", "aria-describedby"]) {
    for (const each of element.querySelectorAll(`[${name}]`)) each.setAttribute(name, own(each.getAttribute(name)));
  }
  element.setAttribute("aria-label", panes.length ? "Second text" : "Text");
  part("panes").append(element);
  panes.push(new Pane(page, element));
  page.changed();
  return panes.at(-1);
}

function compare() {
  if (panes.length > 1) {
    panes.pop().element.remove();
    return page.changed();
  }
  const [first] = panes;
  const others = page.models.filter((model) => model !== first.model);
  const other = others.find(tokenByToken) ?? others[0];
  const second = addPane();
  second.settings.choose((other ?? first.model).id, other ? "balanced" : "quality");
  second.offer();
  page.changed();
}

function write(event) {
  event.preventDefault();
  if (panes.some((pane) => pane.run)) return panes.forEach((pane) => pane.run?.abort());
  clear("prompt");
  for (const pane of panes) pane.ask();
}

function insertHole() {
  const prompt = part("prompt");
  prompt.focus();
  prompt.setRangeText("[[8]]", prompt.selectionStart, prompt.selectionEnd, "end");
  prompt.dispatchEvent(new Event("input"));
}

part("ask").addEventListener("submit", write);
part("hole").addEventListener("click", insertHole);
part("compare").addEventListener("click", compare);
part("prompt").addEventListener("input", () => panes.forEach((pane) => pane.offer()));
part("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) part("ask").requestSubmit();
});
part("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  unlock(part("key").value);
  clear("key");
  part("unlock").hidden = true;
  open();
});
open();
