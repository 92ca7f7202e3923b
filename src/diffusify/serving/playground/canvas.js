// The tokens of a text on the page: drawing, keyboard navigation and selection.

export function percent(share) {
  if (share < 0.001) return "<0.1 %";
  if (share > 0.999) return ">99.9 %";
  return `${(100 * share).toFixed(share < 0.01 || share > 0.99 ? 1 : 0)} %`;
}

/** A token's text with visible symbols for whitespace and control characters. */
export function visible(text) {
  if (!text.trim()) return [...text].map((letter) => ({ "\n": "↵\n", "\t": "⇥\t", " ": "␣" })[letter] ?? "·").join("") || "·";
  return text.replace(/[^\P{C}\n\t]/gu, "·");
}

export function describe(token) {
  if (token.id === null) return "open";
  const facts = [];
  if (token.kind === "given") facts.push("given");
  if (token.confidence != null) facts.push(`probability ${percent(token.confidence)}`);
  if (token.step) facts.push(`decoded in step ${token.step}`);
  if (token.pinned) facts.push("pinned");
  return facts.join(", ");
}

export class Canvas {
  selection = new Set();
  multiple = false; // whether a plain click adds to the selection
  shown = [];
  focus = 0;
  anchor = 0; // where a selection starts

  /** `actions` handles the commands: inspect(position), regenerate(), pin(), undo(), redo(), paintTools(). */
  constructor(list, actions) {
    Object.assign(this, { list, actions });
    list.addEventListener("keydown", (event) => this.onKey(event));
    list.addEventListener("click", (event) => this.onClick(event));
    list.addEventListener("pointerdown", (event) => this.onDown(event));
    list.addEventListener("pointerover", (event) => this.onDrag(event));
    list.addEventListener("focusin", (event) => this.moveTo(this.positionOf(event)));
    addEventListener("pointerup", () => (this.dragging = false));
  }

  draw(tokens) {
    const before = this.shown;
    this.shown = tokens;
    while (this.list.children.length > tokens.length) this.list.lastChild.remove();
    tokens.forEach((token, position) => {
      const cell = this.list.children[position] ?? this.list.appendChild(newCell());
      if (token !== before[position]) paintCell(cell, token, before[position]?.id === null);
    });
    this.selection = new Set([...this.selection].filter((position) => position < tokens.length));
    this.moveTo(Math.max(0, Math.min(this.focus, tokens.length - 1)));
    this.paintSelection();
  }

  paintSelection() {
    [...this.list.children].forEach((cell, i) => cell.setAttribute("aria-selected", this.selection.has(i)));
  }

  select(positions) {
    this.selection = new Set(positions);
    this.paintSelection();
    this.actions.paintTools();
  }

  toggle(position) {
    const rest = [...this.selection].filter((other) => other !== position);
    this.anchor = position;
    this.select(this.selection.has(position) ? rest : [...rest, position]);
  }

  selectTo(position) {
    const from = Math.min(this.anchor, position);
    this.select(Array.from({ length: Math.abs(position - this.anchor) + 1 }, (_, i) => from + i));
  }

  inspect(position) {
    this.anchor = position;
    this.select([position]);
    this.actions.inspect(position);
  }

  /** Makes one token reachable with Tab (a roving tabindex). */
  moveTo(position) {
    this.list.children[this.focus]?.setAttribute("tabindex", -1);
    this.focus = position;
    this.list.children[position]?.setAttribute("tabindex", 0);
  }

  positionOf({ target }) {
    return [...this.list.children].indexOf(target.closest("[role=option]"));
  }

  onClick(event) {
    const position = this.positionOf(event);
    if (position < 0 || this.dragged) return;
    if (event.shiftKey) this.selectTo(position);
    else if (event.ctrlKey || event.metaKey || this.multiple) this.toggle(position);
    else this.inspect(position);
  }

  onDown(event) {
    this.dragged = false;
    this.dragging = event.pointerType !== "touch" && !event.shiftKey && this.positionOf(event) >= 0;
    if (this.dragging) this.anchor = this.positionOf(event);
  }

  onDrag(event) {
    const position = this.positionOf(event);
    if (!this.dragging || position < 0 || (position === this.anchor && !this.dragged)) return;
    this.dragged = true;
    this.selectTo(position);
  }

  onKey(event) {
    const command = event.ctrlKey || event.metaKey;
    const commands = { z: event.shiftKey ? "redo" : "undo", y: "redo" };
    const keys = { delete: "regenerate", backspace: "regenerate", p: "pin" };
    const action = (command ? commands : keys)[event.key.toLowerCase()];
    const position = this.destination(event.key);
    if (action) this.actions[action]();
    else if (command && event.key === "a") this.select(this.shown.keys());
    else if (event.key === "Enter" && !command) this.inspect(this.focus);
    else if (event.key === " ") this.toggle(this.focus);
    else if (event.key === "Escape") this.select([]);
    else if (position !== undefined) this.focusOn(position, event.shiftKey);
    else return;
    event.preventDefault();
  }

  focusOn(position, selecting) {
    this.list.children[position].focus();
    if (selecting) this.selectTo(position);
    else this.anchor = position;
  }

  destination(key) {
    const last = this.shown.length - 1;
    if (key === "ArrowLeft") return Math.max(0, this.focus - 1);
    if (key === "ArrowRight") return Math.min(last, this.focus + 1);
    if (key === "ArrowUp") return this.onNextLine(-1);
    if (key === "ArrowDown") return this.onNextLine(1);
    return { Home: 0, End: last }[key];
  }

  /** The token nearest to the focused one on the line above (-1) or below (1). */
  onNextLine(direction) {
    const boxes = [...this.list.children].map((cell) => cell.lastChild.getClientRects()[0]);
    const current = boxes[this.focus];
    const offset = (box) => direction * (box.bottom - current.bottom);
    const distance = (box) => 10 * offset(box) + Math.abs(box.left + box.right - current.left - current.right);
    const candidates = [...boxes.keys()].filter((i) => offset(boxes[i]) > current.height / 2);
    return candidates.reduce((best, i) => (best === this.focus || distance(boxes[i]) < distance(boxes[best]) ? i : best), this.focus);
  }
}

function newCell() {
  const cell = document.createElement("span");
  cell.setAttribute("role", "option");
  cell.tabIndex = -1;
  cell.append(new Text(), document.createElement("span"));
  return cell;
}

function paintCell(cell, token, wasOpen) {
  const open = token.id === null;
  const word = token.text.trimStart();
  cell.firstChild.data = word && token.text.slice(0, -word.length); // spaces before a word are not coloured
  cell.lastChild.textContent = open ? "" : visible(word || token.text);
  cell.className = token.kind;
  cell.classList.toggle("blank", !word);
  cell.classList.toggle("pinned", Boolean(token.pinned));
  cell.classList.toggle("fresh", wasOpen && !open);
  cell.style.setProperty("--confidence", token.confidence ?? 1);
  cell.setAttribute("aria-label", open ? "open" : `${visible(token.text).trim()}, ${describe(token)}`);
}
