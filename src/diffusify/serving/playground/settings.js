// Which model writes, and how.

const WAYS = ["steps", "threshold", "tolerance"]; // the others are presets

export const tokenByToken = ({ diffusion }) => diffusion.attention === "Causal()";

export class Settings {
  constructor(element, models) {
    Object.assign(this, { element, models });
    this.field("model").append(...models.map(({ id }) => new Option(id)));
  }

  field(name) {
    return this.element.querySelector(`[name=${name}]`);
  }

  number(name) {
    const { value } = this.field(name);
    return value === "" ? undefined : Number(value);
  }

  get model() {
    return this.models.find(({ id }) => id === this.field("model").value);
  }

  get stepwise() {
    return !tokenByToken(this.model);
  }

  choose(model, way) {
    this.field("model").value = model;
    this.field("way").value = way;
  }

  /** Shows only what makes sense for the model and the prompt. */
  offer(holes) {
    const [way, { lossless }] = [this.field("way"), this.model.diffusion];
    const show = (name, offered) => (this.element.querySelector(`[data-field=${name}]`).hidden = !offered);
    if (way.value === "tolerance" && !lossless) way.value = "balanced";
    way.querySelector("[value=tolerance]").hidden = !lossless;
    show("way", this.stepwise);
    for (const name of WAYS) show(name, this.stepwise && way.value === name);
    show("max_tokens", !holes);
    const [chosen] = way.selectedOptions;
    const told = this.stepwise ? chosen.text.toLowerCase() : "token by token";
    this.element.querySelector("[id^=way-help]").textContent = chosen.dataset.help;
    this.element.querySelector(".summary").textContent = `${told}, temperature ${this.number("temperature")}`;
  }

  /** The fields of a request. */
  sampling() {
    const way = this.field("way").value;
    const how = WAYS.includes(way) ? { [way]: this.number(way) } : { preset: way };
    return { ...(this.stepwise && how), temperature: this.number("temperature"), seed: this.number("seed") };
  }
}
