// One model's text on the page: generating it, editing it and going back through its steps.

import { asCurl, asPython, streamEvents } from "./api.js";
import { Canvas } from "./canvas.js";
import { Draft } from "./draft.js";
import { Settings } from "./settings.js";

const hasSpans = (text) => /(?<!\\)\[\[(\d+(-\d+)?|\.\.\.|…)\]\]/.test(text);

export class Pane {
  draft = new Draft();
  run = null;
  regenerations = 0;

  constructor(page, element) {
    Object.assign(this, { page, element });
    this.canvas = new Canvas(this.find(".canvas"), this);
    this.settings = new Settings(element, page.models);
    element.addEventListener("change", ({ target }) => this.changed(target));
    element.addEventListener("click", ({ target }) => this[target.dataset.action]?.());
    this.find("[type=range]").addEventListener("input", ({ target }) => this.showStep(Number(target.value)));
    this.update();
  }

  find = (selector) => this.element.querySelector(selector);

  get model() {
    return this.settings.model;
  }

  get infills() {
    return this.model.diffusion.infills;
  }

  changed({ name, value }) {
    if (name === "length") this.draft.show(Number(value));
    if (name === "model") this.reset();
    this.update();
    this.page.changed();
  }

  update() {
    this.settings.update(hasSpans(this.page.prompt));
    this.paint();
  }

  // Generating

  generate() {
    const [model, text, sampling] = [this.model.id, this.page.prompt, this.settings.sampling()];
    this.canvas.select([]);
    if (hasSpans(text)) return this.send({ path: "/v1/infill", body: { model, text, ...sampling } });
    const body = { model, prompt: text, max_tokens: this.settings.number("max_tokens"), ...sampling };
    return this.send({ path: "/v1/completions", body });
  }

  /** Masks the tokens to drop and fills all open positions. The seed changes each time, so that the text does. */
  async refill(drop) {
    if (this.run || !this.draft.version) return;
    const tokens = this.infills ? this.draft.mask(drop) : this.draft.maskFrom(drop);
    const ids = tokens.map(({ id }) => id);
    if (!ids.includes(null)) return this.note("Nothing to generate: all tokens are kept.");
    const before = this.draft.text;
    const sampling = this.settings.sampling();
    this.regenerations += 1;
    if (sampling.seed !== undefined) sampling.seed += this.regenerations;
    const body = { model: this.model.id, tokens: ids, ...sampling };
    const done = await this.send({ path: "/v1/infill", body }, tokens);
    if (done && this.draft.text === before && !sampling.temperature) {
      this.note("The text did not change: temperature 0 always takes the most likely token. Raise it, or choose an alternative.");
    }
  }

  /** Sends a request and shows its events. Returns whether it finished. */
  async send(request, sent) {
    const version = { request, tracks: [], track: 0, length: 0 };
    const started = performance.now();
    this.run = new AbortController();
    this.showError();
    this.note("");
    this.paint();
    this.page.changed();
    this.page.announce(`${this.model.id} is generating.`);
    try {
      for await (const event of streamEvents(request, this.run.signal)) {
        this.draft.receive(version, event, sent, (performance.now() - started) / 1000);
        this.paintSoon();
      }
      const { written, forwards } = this.draft.frames.at(-1);
      this.page.announce(`${this.model.id} finished: ${written} tokens in ${forwards} forward passes.`);
      return true;
    } catch (error) {
      if (error.name === "AbortError") this.page.announce("Stopped.");
      else this.showError(error);
      return false;
    } finally {
      this.run.abort();
      this.run = null;
      this.page.changed();
      this.paint();
    }
  }

  // Editing; the buttons name these methods

  regenerate() {
    const chosen = this.canvas.selection;
    if (chosen.size) this.refill((_, i) => chosen.has(i));
  }

  regenerateRest() {
    const keep = (token, i) => token.pinned || this.canvas.selection.has(i);
    const last = this.draft.tokens.findLastIndex(keep);
    this.refill((token, i) => (this.infills ? token.kind === "written" && !keep(token, i) : i > last));
  }

  fillOpen() {
    this.refill(() => false);
  }

  get allPinned() {
    return [...this.canvas.selection].every((i) => this.draft.tokens[i].pinned);
  }

  pin() {
    if (!this.run && this.canvas.selection.size) this.change(() => this.draft.pin(this.canvas.selection, !this.allPinned));
  }

  replace(position, tokens) {
    this.change(() => this.draft.replace(position, tokens));
  }

  undo() {
    if (!this.run) this.change(() => this.draft.move(-1));
  }

  redo() {
    if (!this.run) this.change(() => this.draft.move(1));
  }

  change(edit) {
    this.pause();
    this.note("");
    edit();
    this.paint();
  }

  reset() {
    this.draft = new Draft();
    this.showError();
    this.pause();
  }

  selectSeveral() {
    this.canvas.multiple = !this.canvas.multiple;
    this.paintTools();
  }

  inspect(position) {
    if (!this.run) this.page.inspect(this, position);
  }

  copyText = () => this.page.copy(this.draft.text);
  copyCurl = () => this.page.copy(asCurl(this.draft.version.request));
  copyPython = () => this.page.copy(asPython(this.draft.version.request));

  // Going back through the steps

  showStep(step) {
    this.pause();
    this.draft.step = step;
    this.paint();
  }

  play() {
    const draft = this.draft;
    if (this.timer) return this.pause();
    if (draft.step === draft.last) draft.step = 0;
    this.timer = setInterval(() => {
      draft.step += 1;
      if (draft.step >= draft.last) this.pause();
      this.paint();
    }, Math.max(40, Math.min(250, 6000 / draft.frames.length)));
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.paintTimeline();
  }

  // Showing

  note(text) {
    this.find(".note").textContent = text;
  }

  /** Shows an error next to the field that caused it, or clears earlier errors. */
  showError(error) {
    for (const place of this.element.querySelectorAll(".error")) place.textContent = "";
    for (const field of this.element.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
    if (!error || this.page.showError(error)) return;
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
    const started = Boolean(this.draft.version);
    this.find(".empty").hidden = started;
    for (const part of this.element.querySelectorAll(".canvas, .under")) part.hidden = !started;
    this.find("[name=model]").disabled = Boolean(this.run);
    this.element.setAttribute("aria-busy", Boolean(this.run));
    this.canvas.draw(this.draft.tokens);
    this.paintLengths();
    this.paintTimeline();
    this.paintCounters();
    this.paintTools();
  }

  paintLengths() {
    const { tracks = [], track, kept } = this.draft.version ?? {};
    const length = ([{ tokens }]) => tokens.filter(({ id }) => id === null).length;
    const name = (frames, i) => `${length(frames)} tokens${i === kept ? ", kept" : ""}`;
    this.find(".lengths").hidden = tracks.length < 2;
    this.find("[name=length]").replaceChildren(...tracks.map((frames, i) => new Option(name(frames, i), i, false, i === track)));
  }

  paintTimeline() {
    const [slider, { step, last }] = [this.find("[type=range]"), this.draft];
    slider.max = last;
    slider.value = step;
    slider.setAttribute("aria-valuetext", `step ${step} of ${last}`);
    this.find("output").textContent = `step ${step} of ${last}`;
    this.find("[data-action=play]").setAttribute("aria-label", this.timer ? "Pause" : "Play");
  }

  paintCounters() {
    const { written = 0, forwards = 0, seconds = 0 } = this.draft.frames[this.draft.step] ?? {};
    const rate = forwards ? (written / forwards).toFixed(2) : "–";
    const counts = { tokens: written, forwards, rate, seconds: seconds.toFixed(1) };
    for (const [name, count] of Object.entries(counts)) this.find(`[data-count=${name}]`).textContent = count;
  }

  /** Called by the canvas when the selection changes. */
  paintTools() {
    const [{ tokens, current, versions }, selected] = [this.draft, this.canvas.selection.size];
    const open = tokens.filter(({ id }) => id === null).length;
    const tool = (action, enabled, text) => {
      const button = this.find(`[data-action=${action}]`);
      button.disabled = Boolean(this.run) || !enabled;
      button.textContent = text;
    };
    tool("regenerate", selected, this.infills ? "Regenerate" : "Regenerate from here");
    tool("pin", selected, selected && this.allPinned ? "Unpin" : "Pin");
    const keeps = selected || tokens.some(({ pinned }) => pinned);
    tool("regenerateRest", keeps, this.infills ? "Regenerate the rest" : "Regenerate all after");
    tool("fillOpen", open, `Fill open positions (${open})`);
    tool("undo", current > 0, "Undo");
    tool("redo", current < versions.length - 1, "Redo");
    this.find("[data-action=fillOpen]").hidden = !open || Boolean(this.run);
    this.find("[data-action=selectSeveral]").setAttribute("aria-pressed", this.canvas.multiple);
    this.find("[data-selected]").textContent = selected ? `${selected} selected` : "Click a token, or drag over several.";
    this.find(".onward").hidden = this.infills || !selected;
  }
}
