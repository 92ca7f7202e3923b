// One model's text on the page: how it is written, and what is done to it.

import { asCurl, asPython, watch } from "./api.js";
import { Canvas } from "./canvas.js";
import { Draft } from "./draft.js";
import { Settings } from "./settings.js";

export const hasHoles = (text) => /(?<!\\)\[\[\d+(-\d+)?\]\]/.test(text);

export class Pane {
  draft = new Draft();
  run = null;
  rewrites = 0;

  constructor(page, element) {
    Object.assign(this, { page, element });
    this.canvas = new Canvas(this.find(".canvas"), this);
    this.settings = new Settings(element, page.models);
    element.addEventListener("change", ({ target }) => this.changed(target));
    element.addEventListener("click", ({ target }) => this[target.dataset.do]?.());
    this.find("[type=range]").addEventListener("input", ({ target }) => this.scrub(Number(target.value)));
    this.offer();
  }

  find = (selector) => this.element.querySelector(selector);

  get model() {
    return this.settings.model;
  }

  get infills() {
    return this.model.diffusion.infills;
  }

  changed({ name, value }) {
    if (name === "size") this.draft.look(Number(value));
    if (name === "model") this.forget();
    this.offer();
    this.page.changed();
  }

  offer() {
    this.settings.offer(hasHoles(this.page.prompt));
    this.paint();
  }

  // Writing

  ask() {
    const [model, text, sampling] = [this.model.id, this.page.prompt, this.settings.sampling()];
    this.canvas.select([]);
    if (hasHoles(text)) return this.write({ path: "/v1/infill", body: { model, text, ...sampling } });
    const body = { model, prompt: text, max_tokens: this.settings.number("max_tokens"), ...sampling };
    return this.write({ path: "/v1/completions", body });
  }

  /** Opens the tokens to drop and writes what is open; with another seed each time, so that each draw is a new one. */
  async rewrite(drop) {
    if (this.run || !this.draft.take) return;
    const tokens = this.infills ? this.draft.without(drop) : this.draft.before(drop);
    const ids = tokens.map(({ id }) => id);
    if (!ids.includes(null)) return this.note("There is nothing to write: all tokens are kept.");
    const before = this.draft.text;
    const sampling = this.settings.sampling();
    this.rewrites += 1;
    if (sampling.seed !== undefined) sampling.seed += this.rewrites;
    const body = { model: this.model.id, tokens: ids, ...sampling };
    const done = await this.write({ path: "/v1/infill", body }, tokens);
    if (done && this.draft.text === before && !sampling.temperature) {
      this.note("The same text came back: at temperature 0 the model takes its first choice. Raise it, or pick an alternative.");
    }
  }

  /** Says whether all was written. */
  async write(request, sent) {
    const take = { request, tracks: [], track: 0, room: 0 };
    const began = performance.now();
    this.run = new AbortController();
    this.complain();
    this.note("");
    this.paint();
    this.page.changed();
    this.page.announce(`${this.model.id} writes.`);
    try {
      for await (const told of watch(request, this.run.signal)) {
        this.draft.receive(take, told, sent, (performance.now() - began) / 1000);
        this.paintSoon();
      }
      const { written, forwards } = this.draft.frames.at(-1);
      this.page.announce(`${this.model.id} is done: ${written} tokens in ${forwards} forwards.`);
      return true;
    } catch (error) {
      if (error.name === "AbortError") this.page.announce("Stopped.");
      else this.complain(error);
      return false;
    } finally {
      this.run.abort();
      this.run = null;
      this.page.changed();
      this.paint();
    }
  }

  // What is done to the text; most of these are named by the buttons

  again() {
    const chosen = this.canvas.selection;
    if (chosen.size) this.rewrite((_, i) => chosen.has(i));
  }

  rest() {
    const keep = (token, i) => token.pinned || this.canvas.selection.has(i);
    const last = this.draft.tokens.findLastIndex(keep);
    this.rewrite((token, i) => (this.infills ? token.kind === "written" && !keep(token, i) : i > last));
  }

  goOn() {
    this.rewrite(() => false);
  }

  get allPinned() {
    return [...this.canvas.selection].every((i) => this.draft.tokens[i].pinned);
  }

  pin() {
    if (!this.run && this.canvas.selection.size) this.change(() => this.draft.pin(this.canvas.selection, !this.allPinned));
  }

  put(position, tokens) {
    this.change(() => this.draft.put(position, tokens));
  }

  undo() {
    if (!this.run) this.change(() => this.draft.travel(-1));
  }

  redo() {
    if (!this.run) this.change(() => this.draft.travel(1));
  }

  change(how) {
    this.pause();
    this.note("");
    how();
    this.paint();
  }

  forget() {
    this.draft = new Draft();
    this.complain();
    this.pause();
  }

  several() {
    this.canvas.several = !this.canvas.several;
    this.paintTools();
  }

  inspect(position) {
    if (!this.run) this.page.inspect(this, position);
  }

  copyText = () => this.page.copy(this.draft.text);
  copyCurl = () => this.page.copy(asCurl(this.draft.take.request));
  copyPython = () => this.page.copy(asPython(this.draft.take.request));

  // Looking back

  scrub(at) {
    this.pause();
    this.draft.at = at;
    this.paint();
  }

  play() {
    const draft = this.draft;
    if (this.timer) return this.pause();
    if (draft.at === draft.last) draft.at = 0;
    this.timer = setInterval(() => {
      draft.at += 1;
      if (draft.at >= draft.last) this.pause();
      this.paint();
    }, Math.max(40, Math.min(250, 6000 / draft.frames.length)));
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.paintTimeline();
  }

  // Telling

  note(text) {
    this.find(".note").textContent = text;
  }

  /** Shows a refusal next to what caused it, or clears what was refused before. */
  complain(error) {
    for (const place of this.element.querySelectorAll(".error")) place.textContent = "";
    for (const field of this.element.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
    if (!error || this.page.refused(error)) return;
    const field = this.find(`[name="${CSS.escape(error.param ?? "")}"]`);
    field?.setAttribute("aria-invalid", "true");
    if (field?.closest("details")) field.closest("details").open = true;
    this.find(field ? `[id^="${field.name}-error"]` : "[data-error]").textContent = error.message;
  }

  paintSoon() {
    this.soon ??= requestAnimationFrame(() => this.paint());
  }

  paint() {
    cancelAnimationFrame(this.soon);
    this.soon = null;
    const begun = Boolean(this.draft.take);
    this.find(".empty").hidden = begun;
    for (const part of this.element.querySelectorAll(".canvas, .under")) part.hidden = !begun;
    this.find("[name=model]").disabled = Boolean(this.run);
    this.element.setAttribute("aria-busy", Boolean(this.run));
    this.canvas.draw(this.draft.tokens);
    this.paintSizes();
    this.paintTimeline();
    this.paintCounters();
    this.paintTools();
  }

  paintSizes() {
    const { tracks = [], track, kept } = this.draft.take ?? {};
    const room = ([{ tokens }]) => tokens.filter(({ id }) => id === null).length;
    const name = (frames, i) => `room for ${room(frames)}${i === kept ? ", kept" : ""}`;
    this.find(".sizes").hidden = tracks.length < 2;
    this.find("[name=size]").replaceChildren(...tracks.map((frames, i) => new Option(name(frames, i), i, false, i === track)));
  }

  paintTimeline() {
    const [slider, { at, last }] = [this.find("[type=range]"), this.draft];
    slider.max = last;
    slider.value = at;
    slider.setAttribute("aria-valuetext", `step ${at} of ${last}`);
    this.find("output").textContent = `step ${at} of ${last}`;
    this.find("[data-do=play]").setAttribute("aria-label", this.timer ? "Pause" : "Play");
  }

  paintCounters() {
    const { written = 0, forwards = 0, seconds = 0 } = this.draft.frames[this.draft.at] ?? {};
    const rate = forwards ? (written / forwards).toFixed(2) : "–";
    const counts = { tokens: written, forwards, rate, seconds: seconds.toFixed(1) };
    for (const [name, count] of Object.entries(counts)) this.find(`[data-count=${name}]`).textContent = count;
  }

  /** The canvas asks for this when the selection changes. */
  paintTools() {
    const [{ tokens, now, takes }, chosen] = [this.draft, this.canvas.selection.size];
    const open = tokens.filter(({ id }) => id === null).length;
    const tool = (does, offered, text) => {
      const button = this.find(`[data-do=${does}]`);
      button.disabled = Boolean(this.run) || !offered;
      button.textContent = text;
    };
    tool("again", chosen, this.infills ? "Write again" : "Write anew from here");
    tool("pin", chosen, chosen && this.allPinned ? "Unpin" : "Pin");
    tool("rest", chosen || tokens.some(({ pinned }) => pinned), this.infills ? "Write the rest anew" : "Write all behind anew");
    tool("goOn", open, `Write the ${open} open`);
    tool("undo", now > 0, "Undo");
    tool("redo", now < takes.length - 1, "Redo");
    this.find("[data-do=goOn]").hidden = !open || Boolean(this.run);
    this.find("[data-do=several]").setAttribute("aria-pressed", this.canvas.several);
    this.find("[data-chosen]").textContent = chosen ? `${chosen} selected` : "Click a token, or drag over several.";
    this.find(".onward").hidden = this.infills || !chosen;
  }
}
