// The model and its sampling settings.

const PARAMETERS = ["steps", "threshold", "tolerance"]; // methods with a parameter of this name; the others are presets

export const isAutoregressive = ({ diffusion }) => diffusion.attention === "Causal()";

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
    return !isAutoregressive(this.model);
  }

  set(model, method) {
    this.field("model").value = model;
    this.field("method").value = method;
  }

  /** Shows only the settings that apply to the model and the prompt. */
  update(hasSpans) {
    const [method, { lossless }] = [this.field("method"), this.model.diffusion];
    const show = (name, visible) => (this.element.querySelector(`[data-field=${name}]`).hidden = !visible);
    if (method.value === "tolerance" && !lossless) method.value = "balanced";
    method.querySelector("[value=tolerance]").hidden = !lossless;
    show("method", this.stepwise);
    for (const name of PARAMETERS) show(name, this.stepwise && method.value === name);
    show("max_tokens", !hasSpans);
    const [chosen] = method.selectedOptions;
    const summary = this.stepwise ? chosen.text.toLowerCase() : "token by token";
    this.element.querySelector("[id^=method-help]").textContent = chosen.dataset.help;
    this.element.querySelector(".summary").textContent = `${summary}, temperature ${this.number("temperature")}`;
  }

  /** The fields of a request. */
  sampling() {
    const method = this.field("method").value;
    const decoding = PARAMETERS.includes(method) ? { [method]: this.number(method) } : { preset: method };
    return { ...(this.stepwise && decoding), temperature: this.number("temperature"), seed: this.number("seed") };
  }
}
