// What is known of one token, and what could stand in its place.

import { ask } from "./api.js";
import { describe, percent, visible } from "./canvas.js";

const part = (id) => document.getElementById(id);
let shown = null; // the pane, the position, and what stops asking for alternatives

export async function inspect(pane, position) {
  const token = pane.draft.tokens[position];
  shown?.asking.abort();
  shown = { pane, position, asking: new AbortController() };
  part("token-title").textContent = token.id === null ? "Open position" : visible(token.text).trim();
  part("token-facts").textContent = token.id === null ? "Nothing is written here yet." : describe(token);
  part("token-error").textContent = "";
  part("token-wait").textContent = "Looking for alternatives…";
  part("alternatives").replaceChildren();
  part("own-text").value = "";
  part("token-pin").hidden = token.id === null;
  part("token-pin").textContent = token.pinned ? "Unpin" : "Pin";
  part("token-again").textContent = pane.infills ? "Write again" : "Write anew from here";
  part("token").showPopover();
  const cell = pane.canvas.list.children[position];
  cell.scrollIntoView({ block: "nearest" });
  place(cell.getBoundingClientRect());
  try {
    const tokens = pane.draft.tokens.map(({ id }) => id);
    const body = { model: pane.model.id, tokens, position, top: 8 };
    const { alternatives } = await ask("/v1/alternatives", body, shown.asking.signal);
    part("token-wait").textContent = "";
    part("alternatives").append(...alternatives.map(row));
    if (document.activeElement === part("token")) part("alternatives").querySelector("button")?.focus();
  } catch (error) {
    if (error.name === "AbortError") return;
    part("token-wait").textContent = "";
    part("token-error").textContent = error.message;
  }
}

/** Below the token, or above where there is more room. */
function place(box) {
  const popover = part("token");
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
  button.onclick = () => act((pane, position) => pane.put(position, [alternative]));
  const item = document.createElement("li");
  item.append(button);
  return item;
}

/** Closes first, so that the keyboard is back at the token. */
function act(how) {
  const { pane, position } = shown;
  part("token").hidePopover();
  how(pane, position);
}

async function putOwn(event) {
  event.preventDefault();
  const { pane, position } = shown;
  const token = pane.draft.tokens[position];
  const words = part("own-text").value.trim();
  const apart = /^[\p{L}\p{N}]/u.test(words) && (token.id === null ? position > 0 : /^\s/.test(token.text));
  try {
    const { tokens } = await ask("/v1/tokenize", { model: pane.model.id, text: (apart ? " " : "") + words });
    act(() => pane.put(position, tokens));
  } catch (error) {
    part("token-error").textContent = error.message;
  }
}

function walk(event) {
  const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
  if (!step) return;
  event.preventDefault();
  event.target.closest("li")[step]?.firstChild.focus();
}

part("own").addEventListener("submit", putOwn);
part("alternatives").addEventListener("keydown", walk);
part("token-pin").addEventListener("click", () => act((pane) => pane.pin()));
part("token-again").addEventListener("click", () => act((pane) => pane.again()));
part("token").addEventListener("toggle", ({ newState }) => newState === "closed" && shown.asking.abort());
