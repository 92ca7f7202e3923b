// The page: a prompt, and one model or two side by side.

import { request, setKey } from "./api.js";
import { inspect } from "./inspector.js";
import { Pane } from "./pane.js";
import { isAutoregressive } from "./settings.js";

const byId = (id) => document.getElementById(id);
const panes = [];

const page = {
  models: [],
  inspect,

  get prompt() {
    return byId("prompt").value;
  },

  announce(text) {
    byId("status").textContent = text;
  },

  /** Updates the page after a pane changed its settings, or started or finished a request. */
  changed() {
    const running = panes.some((pane) => pane.run);
    const infills = panes.some((pane) => pane.infills);
    byId("run").textContent = running ? "Stop" : "Generate";
    byId("compare").disabled = running;
    byId("compare").setAttribute("aria-pressed", panes.length > 1);
    for (const id of ["insert-span", "span-help"]) byId(id).hidden = !infills;
  },

  /** Shows an error about the prompt or the key. Returns whether the error is of that kind. */
  showError(error) {
    const key = error.status === 401;
    if (!key && !["prompt", "text"].includes(error.param)) return false;
    byId("unlock").hidden = !key;
    byId(key ? "key-error" : "prompt-error").textContent = error.message;
    byId(key ? "key" : "prompt").setAttribute("aria-invalid", "true");
    byId(key ? "key" : "prompt").focus();
    return true;
  },

  async copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      page.announce("Copied.");
    } catch {
      byId("copy").querySelector("textarea").value = text; // if the page may not use the clipboard
      byId("copy").showModal();
      byId("copy").querySelector("textarea").select();
    }
  },
};

async function open() {
  clear("prompt");
  try {
    page.models = (await request("/v1/models")).data;
    addPane();
  } catch (error) {
    if (!page.showError(error)) byId("prompt-error").textContent = error.message;
  }
}

function clear(id) {
  byId(id).removeAttribute("aria-invalid");
  byId(`${id}-error`).textContent = "";
}

function addPane() {
  const element = byId("pane").content.firstElementChild.cloneNode(true);
  const numbered = (ids) => ids.split(" ").map((id) => `${id}-${panes.length + 1}`).join(" ");
  for (const name of ["id", "for", "aria-describedby"]) {
    for (const each of element.querySelectorAll(`[${name}]`)) each.setAttribute(name, numbered(each.getAttribute(name)));
  }
  element.setAttribute("aria-label", panes.length ? "Second text" : "Text");
  byId("panes").append(element);
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
  const other = others.find(isAutoregressive) ?? others[0];
  const second = addPane();
  second.settings.set((other ?? first.model).id, other ? "balanced" : "quality");
  second.update();
  page.changed();
}

function generate(event) {
  event.preventDefault();
  if (panes.some((pane) => pane.run)) return panes.forEach((pane) => pane.run?.abort());
  clear("prompt");
  for (const pane of panes) pane.generate();
}

function insertSpan() {
  const prompt = byId("prompt");
  prompt.focus();
  prompt.setRangeText("[[8]]", prompt.selectionStart, prompt.selectionEnd, "end");
  prompt.dispatchEvent(new Event("input"));
}

byId("generate").addEventListener("submit", generate);
byId("insert-span").addEventListener("click", insertSpan);
byId("compare").addEventListener("click", compare);
byId("prompt").addEventListener("input", () => panes.forEach((pane) => pane.update()));
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("generate").requestSubmit();
});
byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value);
  clear("key");
  byId("unlock").hidden = true;
  open();
});
open();
