// What the generator may be asked, and in which window its volumes are shown.

import { colourOf } from "./slices.js";

const byId = (id) => document.getElementById(id);
const CT = { Lung: [-600, 1500], "Soft tissue": [40, 400], Bone: [400, 1800] };

export function made(name, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(name), attributes);
  element.append(...children);
  return element;
}

/** The labels as radio buttons, with their colours. */
export function showLabels(labels) {
  const all = [...Object.entries(labels), ["255", "unknown: the generator decides"]];
  const rows = all.map(([value, name]) => {
    const input = made("input", { type: "radio", name: "label", value, id: `label-${value}`, checked: value === "1" });
    const swatch = made("span", { className: "swatch" });
    swatch.style.background = `rgb(${colourOf(Number(value)).join(" ")})`;
    return made("label", { htmlFor: input.id }, input, swatch, `${value} ${name}`);
  });
  byId("labels").replaceChildren(...rows);
}

/** A field for everything that may be asked beside the mask. */
export function showConditions(conditions) {
  const fields = Object.entries(conditions).flatMap(([name, kind]) =>
    name === "covariates" ? Object.entries(kind.facts).map(covariateField) : [conditionField(name, kind)]);
  byId("conditions").replaceChildren(...fields);
}

function covariateField([name, facts]) {
  const id = `covariate-${name}`;
  let field;
  if (facts.values) {
    const options = [made("option", { value: "" }, "unknown"), ...facts.values.map((value) => made("option", { value }, value))];
    field = made("select", { id }, ...options);
  } else {
    field = made("input", { id, type: "number", step: "any", placeholder: `unknown (training ${facts.low} to ${facts.high})` });
  }
  field.dataset.covariate = name;
  return made("label", { htmlFor: id }, `${name} `, field);
}

function conditionField(name, kind) {
  const id = `condition-${name}`;
  const field = kind.by_file ? made("input", { id, type: "file" }) : made("textarea", { id, rows: 2, placeholder: "nothing asked" });
  field.dataset.condition = name;
  return made("label", { htmlFor: id }, `${name} `, made("span", { className: "hint" }, kind.what), field);
}

/** The request as it stands: options by the names of the API, and files of conditions. */
export function request() {
  const number = (id) => Number(byId(id).value);
  const options = { seed: number("seed"), count: number("count"), steps: number("steps"), guidance: number("guidance") };
  const covariates = {};
  const conditions = {};
  const files = {};
  for (const field of document.querySelectorAll("[data-covariate]"))
    if (field.value !== "") covariates[field.dataset.covariate] = field.type === "number" ? Number(field.value) : field.value;
  for (const field of document.querySelectorAll("[data-condition]")) {
    const { condition } = field.dataset;
    if (field.type === "file") {
      if (field.files[0]) files[condition] = field.files[0];
    } else if (field.value.trim()) conditions[condition] = structured(field.value.trim());
  }
  if (Object.keys(covariates).length) options.covariates = covariates;
  if (Object.keys(conditions).length) options.conditions = conditions;
  const [format, masks] = byId("format").value.split(" ");
  if (format !== "nifti") options.format = format;
  if (masks) options.mask_format = masks;
  if (byId("extrapolate").checked) options.allow_extrapolation = true;
  if (byId("check").checked) options.check = 0;
  return { options, files };
}

// Lists and objects as such, all else as the text that it is.
function structured(text) {
  if (!/^[[{]/.test(text)) return text;
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** The windows of a generator; the one of a volume follows it. */
export class Windows {
  constructor(viewer, facts) {
    this.viewer = viewer;
    this.presets = facts.modality === "ct" ? { ...CT } : {};
    const { low, high } = facts.intensity;
    if (typeof low === "number" && typeof high === "number") this.presets["Whole range"] = [(low + high) / 2, high - low];
    byId("preset").replaceChildren(...[...Object.keys(this.presets), "Of the volume", "Custom"].map((name) => made("option", {}, name)));
    byId("preset").addEventListener("change", () => this.choose(byId("preset").value));
    for (const id of ["centre", "width"])
      byId(id).addEventListener("input", () => {
        byId("preset").value = "Custom";
        this.apply(Number(byId("centre").value), Number(byId("width").value));
      });
    this.choose(Object.keys(this.presets)[0] ?? "Of the volume");
  }

  choose(name) {
    byId("preset").value = name;
    const of = name === "Of the volume" ? this.ofVolume() : this.presets[name];
    if (!of) return;
    [byId("centre").value, byId("width").value] = of.map((value) => Number(value.toPrecision(4)));
    this.apply(...of);
  }

  /** After another volume was chosen. */
  refresh() {
    if (byId("preset").value === "Of the volume") this.choose("Of the volume");
  }

  next() {
    const names = [...byId("preset").options].map((option) => option.value).filter((name) => name !== "Custom");
    this.choose(names[(names.indexOf(byId("preset").value) + 1) % names.length]);
  }

  apply(centre, width) {
    this.viewer.window = { centre, width };
    this.viewer.draw();
  }

  // From the 1st to the 99th percentile of every few voxels.
  ofVolume() {
    if (!this.viewer.active) return null;
    const voxels = this.viewer.voxels(this.viewer.active);
    const step = Math.max(1, Math.floor(voxels.length / 50000));
    const some = Float32Array.from({ length: Math.floor(voxels.length / step) }, (_, n) => voxels[n * step]).sort();
    const [low, high] = [0.01, 0.99].map((share) => some[Math.floor(share * (some.length - 1))]);
    return [(low + high) / 2, Math.max(high - low, 1e-6)];
  }
}

/** What people should know of the generator. */
export function showFacts(facts) {
  byId("bundle-name").textContent = `${facts.name} ${facts.version}`;
  document.title = `${facts.name} · FibLDM studio`;
  const rows = {
    "Makes": `${facts.modality.toUpperCase()}, channels ${facts.channels.join(", ")}`,
    "Model grid": `${facts.size.join(" × ")} voxels of ${facts.spacing.join(" × ")} mm`,
    "Licence": `${facts.licence}; data ${facts.data_licence}`,
    "Sampling": Object.entries(facts.sampling).filter(([, value]) => value !== null).map(([name, value]) => `${name} ${value}`).join(", "),
    "Limits": `${Math.round(facts.limits.upload / 2 ** 20)} MiB a request, ${facts.limits.volumes} volumes a job, ${facts.limits.waiting} jobs that wait`,
  };
  byId("facts").replaceChildren(...Object.entries(rows).flatMap(([name, text]) => [made("dt", {}, name), made("dd", {}, text)]));
  byId("card").textContent = facts.card || "This bundle has no card.";
  const { seed, steps, guidance } = facts.sampling;
  Object.assign(byId("seed"), { value: seed });
  Object.assign(byId("steps"), { value: steps });
  Object.assign(byId("guidance"), { value: guidance });
  byId("count").max = facts.limits.volumes;
  byId("check-row").hidden = !facts.checks;
  facts.examples.forEach((name, number) => byId("example").append(made("option", { value: `${number + 1}` }, name)));
}
