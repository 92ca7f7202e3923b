// A text of tokens on the page: it is drawn, walked through and selected.

export function percent(share) {
  if (share < 0.001) return "<0.1 %";
  if (share > 0.999) return ">99.9 %";
  return `${(100 * share).toFixed(share < 0.01 || share > 0.99 ? 1 : 0)} %`;
}

/** A token's letters, with those that leave no ink made visible. */
export function visible(text) {
  if (!text.trim()) return [...text].map((letter) => ({ "\n": "↵\n", "\t": "⇥\t", " ": "␣" })[letter] ?? "·").join("") || "·";
  return text.replace(/[^\P{C}\n\t]/gu, "·");
}

export function describe(token) {
  if (token.id === null) return "open";
  const told = [];
  if (token.kind === "given") told.push("given");
  if (token.confidence != null) told.push(`${percent(token.confidence)} sure`);
  if (token.step) told.push(`written in step ${token.step}`);
  if (token.pinned) told.push("pinned");
  return told.join(", ");
}

export class Canvas {
  selection = new Set();
  several = false; // whether a plain click adds to the selection
  shown = [];
  focus = 0;
  anchor = 0; // where a selection began

  /** `asked` does what is asked for here: inspect(position), again(), pin(), undo(), redo(), paintTools(). */
  constructor(list, asked) {
    Object.assign(this, { list, asked });
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
      if (token !== before[position]) dress(cell, token, before[position]?.id === null);
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
    this.asked.paintTools();
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
    this.asked.inspect(position);
  }

  /** One token can be reached with Tab; the arrows go on from there. */
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
    else if (event.ctrlKey || event.metaKey || this.several) this.toggle(position);
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
    const does = command ? { z: event.shiftKey ? "redo" : "undo", y: "redo" } : { delete: "again", backspace: "again", p: "pin" };
    const wanted = does[event.key.toLowerCase()];
    const position = this.towards(event.key);
    if (wanted) this.asked[wanted]();
    else if (command && event.key === "a") this.select(this.shown.keys());
    else if (event.key === "Enter" && !command) this.inspect(this.focus);
    else if (event.key === " ") this.toggle(this.focus);
    else if (event.key === "Escape") this.select([]);
    else if (position !== undefined) this.walk(position, event.shiftKey);
    else return;
    event.preventDefault();
  }

  walk(position, selecting) {
    this.list.children[position].focus();
    if (selecting) this.selectTo(position);
    else this.anchor = position;
  }

  towards(key) {
    const last = this.shown.length - 1;
    if (key === "ArrowLeft") return Math.max(0, this.focus - 1);
    if (key === "ArrowRight") return Math.min(last, this.focus + 1);
    if (key === "ArrowUp") return this.across(-1);
    if (key === "ArrowDown") return this.across(1);
    return { Home: 0, End: last }[key];
  }

  /** The token nearest to the focused one on the line above (-1) or below (1). */
  across(direction) {
    const boxes = [...this.list.children].map((cell) => cell.lastChild.getClientRects()[0]);
    const here = boxes[this.focus];
    const away = (box) => direction * (box.bottom - here.bottom);
    const distance = (box) => 10 * away(box) + Math.abs(box.left + box.right - here.left - here.right);
    const there = [...boxes.keys()].filter((i) => away(boxes[i]) > here.height / 2);
    return there.reduce((best, i) => (best === this.focus || distance(boxes[i]) < distance(boxes[best]) ? i : best), this.focus);
  }
}

function newCell() {
  const cell = document.createElement("span");
  cell.setAttribute("role", "option");
  cell.tabIndex = -1;
  cell.append(new Text(), document.createElement("span"));
  return cell;
}

function dress(cell, token, wasOpen) {
  const open = token.id === null;
  const ink = token.text.trimStart();
  const lead = ink && token.text.slice(0, -ink.length); // blanks before a word are not coloured
  cell.firstChild.data = lead;
  cell.lastChild.textContent = open ? "" : visible(ink || token.text);
  cell.className = token.kind;
  cell.classList.toggle("blank", !ink);
  cell.classList.toggle("pinned", Boolean(token.pinned));
  cell.classList.toggle("fresh", wasOpen && !open);
  cell.style.setProperty("--confidence", token.confidence ?? 1);
  cell.setAttribute("aria-label", open ? "open" : `${visible(token.text).trim()}, ${describe(token)}`);
}
