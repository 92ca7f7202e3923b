// The dialog for one token: its probability, and alternatives to it.

import { request } from "./api.js";
import { describe, percent, visible } from "./canvas.js";

const byId = (id) => document.getElementById(id);
let shown = null; // the pane, the position, and the AbortController of the request for alternatives

export async function inspect(pane, position) {
  const token = pane.draft.tokens[position];
  shown?.controller.abort();
  shown = { pane, position, controller: new AbortController() };
  byId("token-title").textContent = token.id === null ? "Open position" : visible(token.text).trim();
  byId("token-facts").textContent = token.id === null ? "Not decoded yet." : describe(token);
  byId("token-error").textContent = "";
  byId("token-wait").textContent = "Loading alternatives…";
  byId("alternatives").replaceChildren();
  byId("own-text").value = "";
  byId("token-pin").hidden = token.id === null;
  byId("token-pin").textContent = token.pinned ? "Unpin" : "Pin";
  byId("token-regenerate").textContent = pane.infills ? "Regenerate" : "Regenerate from here";
  byId("token").showPopover();
  const cell = pane.canvas.list.children[position];
  cell.scrollIntoView({ block: "nearest" });
  place(cell.getBoundingClientRect());
  try {
    const tokens = pane.draft.tokens.map(({ id }) => id);
    const body = { model: pane.model.id, tokens, position, top: 8 };
    const { alternatives } = await request("/v1/alternatives", body, shown.controller.signal);
    byId("token-wait").textContent = "";
    byId("alternatives").append(...alternatives.map(row));
    if (document.activeElement === byId("token")) byId("alternatives").querySelector("button")?.focus();
  } catch (error) {
    if (error.name === "AbortError") return;
    byId("token-wait").textContent = "";
    byId("token-error").textContent = error.message;
  }
}

/** Places the dialog below the token, or above it if there is more space. */
function place(box) {
  const popover = byId("token");
  const below = box.bottom + 8;
  const top = below + popover.offsetHeight < innerHeight ? below : Math.max(8, box.top - 8 - popover.offsetHeight);
  const left = Math.max(12, Math.min(box.left, document.documentElement.clientWidth - popover.offsetWidth - 12));
  popover.style.setProperty("--top", `${top + scrollY}px`);
  popover.style.setProperty("--left", `${left}px`);
}

function row(alternative) {
  const button = document.createElement("button");
  const share = document.createElement("span");
  button.type = "button";
  button.style.setProperty("--share", alternative.probability);
  share.textContent = percent(alternative.probability);
  button.append(visible(alternative.text), share);
  button.onclick = () => act((pane, position) => pane.replace(position, [alternative]));
  const item = document.createElement("li");
  item.append(button);
  return item;
}

/** Closes the dialog first, so that the focus returns to the token. */
function act(action) {
  const { pane, position } = shown;
  byId("token").hidePopover();
  action(pane, position);
}

async function insertOwnText(event) {
  event.preventDefault();
  const { pane, position } = shown;
  const token = pane.draft.tokens[position];
  const text = byId("own-text").value.trim();
  const needsSpace = /^[\p{L}\p{N}]/u.test(text) && (token.id === null ? position > 0 : /^\s/.test(token.text));
  try {
    const { tokens } = await request("/v1/tokenize", { model: pane.model.id, text: (needsSpace ? " " : "") + text });
    act(() => pane.replace(position, tokens));
  } catch (error) {
    byId("token-error").textContent = error.message;
  }
}

function moveFocus(event) {
  const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
  if (!step) return;
  event.preventDefault();
  event.target.closest("li")[step]?.firstChild.focus();
}

byId("own").addEventListener("submit", insertOwnText);
byId("alternatives").addEventListener("keydown", moveFocus);
byId("token-pin").addEventListener("click", () => act((pane) => pane.pin()));
byId("token-regenerate").addEventListener("click", () => act((pane) => pane.regenerate()));
byId("token").addEventListener("toggle", ({ newState }) => newState === "closed" && shown.controller.abort());
