// The policy panel: its sliders, and the request fields they stand for.

const NUMBERS = {
  threshold: { label: "Threshold", field: "threshold", min: 0.05, max: 1, step: 0.01, value: 0.9 },
  static: { label: "Tokens per step", field: "tokens_per_step", min: 1, max: 32, step: 1, value: 2 },
  entropy_bound: { label: "Entropy bound, nats", field: "entropy_bound", min: 0, max: 3, step: 0.05, value: 0.1 },
  factor: { label: "Factor", field: "factor", min: 0.05, max: 4, step: 0.05, value: 1 },
};

const byId = (id) => document.getElementById(id);

export class Controls {
  constructor() {
    this.values = Object.fromEntries(Object.entries(NUMBERS).map(([kind, number]) => [kind, number.value]));
    byId("kind").addEventListener("change", () => this.showKind());
    byId("number").addEventListener("input", () => {
      this.values[byId("kind").value] = byId("number").valueAsNumber;
      this.show();
    });
    for (const id of ["temperature", "edit-threshold"]) byId(id).addEventListener("input", () => this.show());
    byId("edits").addEventListener("change", () => {
      byId("edit-threshold").disabled = !byId("edits").checked;
      this.show();
    });
    byId("edit-threshold").disabled = !byId("edits").checked;
    this.showKind();
  }

  showKind() {
    const number = NUMBERS[byId("kind").value], slider = byId("number");
    // The row stays where it is, so nothing below it jumps.
    slider.disabled = !number;
    byId("number-label").textContent = number ? number.label : "As the server was started";
    if (number) {
      Object.assign(slider, { min: number.min, max: number.max, step: number.step });
      slider.value = this.values[byId("kind").value];
    }
    this.show();
  }

  show() {
    const kind = byId("kind").value;
    byId("number-value").textContent = kind ? this.values[kind].toFixed(kind === "static" ? 0 : 2) : "";
    byId("temperature-value").textContent = byId("temperature").valueAsNumber.toFixed(2);
    byId("edit-threshold-value").textContent = byId("edits").checked
      ? `above ${byId("edit-threshold").valueAsNumber.toFixed(2)}`
      : "off";
  }

  // Request fields of the panel. A seed that is drawn here can be said afterwards, so a run can be repeated.
  fields() {
    const fewstep = {}, kind = byId("kind").value, temperature = byId("temperature").valueAsNumber;
    if (kind) {
      fewstep.kind = kind;
      fewstep[NUMBERS[kind].field] = this.values[kind];
    }
    if (byId("edits").checked) fewstep.edit_threshold = byId("edit-threshold").valueAsNumber;
    const seed = byId("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : byId("seed").valueAsNumber;
    return { temperature, seed, fewstep };
  }

  // A number field's value; null = left empty.
  number(id) {
    return byId(id).value === "" ? null : byId(id).valueAsNumber;
  }
}
