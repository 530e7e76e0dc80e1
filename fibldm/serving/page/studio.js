// The page: a mask, drawn on, becomes a request, and the volumes of a job are looked at.

import { Windows, made, request, showConditions, showFacts, showLabels } from "./controls.js";
import { Jobs, loaded } from "./jobs.js";
import { readNifti, writeMask } from "./nifti.js";
import { asked, sentence } from "./signin.js";
import { Viewer } from "./viewer.js";

const byId = (id) => document.getElementById(id);

let facts, viewer, windows, jobs;
let original = null; // the file that was chosen, which is sent as it is while nothing was drawn

async function begin() {
  facts = await (await asked("/api/bundle")).json();
  byId("studio").hidden = false;
  showFacts(facts);
  showLabels(facts.labels);
  showConditions(facts.conditions);
  viewer = new Viewer({ labelNames: facts.labels, onEdit: tellMask, onHover: (text) => { byId("readout").textContent = text; } });
  windows = new Windows(viewer, facts);
  showChannels();
  jobs = new Jobs({ show: showJob, removed: (job) => viewer.removeVolumes(job.id), refused: tellRefusal });
  byId("mask-file").addEventListener("change", () => attempt(chooseFile));
  byId("example").addEventListener("change", () => attempt(chooseExample));
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(generate);
  });
  byId("undo").addEventListener("click", () => viewer.undo());
  byId("save-mask").addEventListener("click", () => attempt(saveMask));
  byId("radius").addEventListener("input", tellRadius);
  for (const radio of document.querySelectorAll("[name=tool]"))
    radio.addEventListener("change", () => byId("planes").classList.toggle("drawing", viewer.tool !== "look"));
  document.addEventListener("keydown", shortcut);
  window.addEventListener("beforeunload", (event) => {
    if (viewer.drawing?.edited && !drawnIsSent) event.preventDefault();
  });
  tellRadius();
  await jobs.load();
}

let drawnIsSent = true;

async function attempt(act) {
  byId("refused").textContent = "";
  try {
    await act();
  } catch (error) {
    tellRefusal(error);
  }
}

function tellRefusal(error) {
  byId("status").textContent = "";
  byId("refused").textContent = sentence(error);
}

function mayReplace() {
  return drawnIsSent || !viewer.drawing?.edited || confirm("What you drew was not generated from. Begin with another mask?");
}

async function chooseFile() {
  const [file] = byId("mask-file").files;
  if (!file || !mayReplace()) return;
  if (file.size > facts.limits.upload) throw new Error(`a mask must have at most ${facts.limits.upload} bytes; this one has ${file.size}`);
  byId("status").textContent = "reading the mask …";
  const form = new FormData();
  form.append("mask", file, "mask");
  const answer = await asked("/api/masks", { method: "POST", body: form });
  showMask(await readNifti(await answer.arrayBuffer()), file);
  byId("example").value = "";
}

async function chooseExample() {
  const chosen = byId("example").value;
  if (!chosen || !mayReplace()) return;
  const answer = await asked(`/api/masks/${chosen}`);
  const content = await answer.arrayBuffer();
  showMask(await readNifti(content.slice(0)), new Blob([content]));
  byId("mask-file").value = "";
}

function showMask(mask, file) {
  original = file;
  drawnIsSent = true;
  viewer.setMask(mask);
  byId("draw").disabled = false;
  byId("generate").disabled = false;
  byId("status").textContent = "";
  tellMask();
  tellRadius();
}

function tellMask() {
  const { size, spacing, degreesOff } = viewer.space;
  const round = (value) => Number(value.toFixed(2));
  const words = [`${size.join(" × ")} voxels of ${spacing.map(round).join(" × ")} mm`];
  if (degreesOff > 1) words.push(`oblique by ${Math.round(degreesOff)}°, letters are the nearest`);
  if (viewer.drawing.edited) words.push("drawn on");
  byId("mask-facts").textContent = words.join(", ");
  byId("undo").disabled = !viewer.drawing.edited;
  if (viewer.drawing.edited) drawnIsSent = false;
}

function tellRadius() {
  byId("radius-told").textContent = `${Number(byId("radius").value)} mm`;
}

async function generate() {
  const drawn = viewer.drawing.edited;
  byId("generate").disabled = true;
  byId("status").textContent = "sending …";
  try {
    await jobs.send(drawn ? await writeMask(viewer.mask) : original, request());
    drawnIsSent = true;
    byId("status").textContent = "";
  } finally {
    byId("generate").disabled = false;
  }
}

/** The volumes of a job, beside those of other jobs of the same mask. */
async function showJob(job) {
  if (!job.mask) {
    byId("status").textContent = "The DICOM series are ready to download.";
    return;
  }
  byId("status").textContent = "reading the volumes …";
  try {
    const { mask, volumes } = await loaded(job, facts.intensity.units);
    if (!sameLabels(mask, viewer.mask)) {
      if (!mayReplace()) return;
      showMask(mask, await writeMask(mask));
    }
    viewer.addVolumes(volumes);
    windows.refresh();
    viewer.show = viewer.show === "mask" ? "volume" : viewer.show;
    byId("status").textContent = "Done: the volumes are shown.";
    setTimeout(() => { byId("status").textContent = ""; }, 8000);
  } catch (error) {
    tellRefusal(error);
  }
}

function sameLabels(one, other) {
  return Boolean(other) && one.data.length === other.data.length && one.data.every((label, n) => label === other.data[n]);
}

async function saveMask() {
  const address = URL.createObjectURL(await writeMask(viewer.mask));
  made("a", { href: address, download: "mask.nii.gz" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

function showChannels() {
  byId("channel-row").hidden = facts.channels.length < 2;
  byId("channel").replaceChildren(...facts.channels.map((name, value) => made("option", { value }, name)));
  byId("channel").addEventListener("change", () => {
    viewer.channel = Number(byId("channel").value);
    windows.refresh();
    viewer.draw();
  });
}

function choose(name, value) {
  const radio = document.querySelector(`[name=${name}][value="${value}"]`);
  if (!radio || radio.matches(":disabled")) return;
  radio.checked = true;
  radio.dispatchEvent(new Event("change"));
}

// In a plane only, so that no letter is taken from who types, and none from a screen reader.
function shortcut(event) {
  if (event.target.tagName !== "CANVAS" || event.altKey || event.metaKey) return;
  const key = event.key.toLowerCase();
  const acts = {
    l: () => choose("tool", "look"), p: () => choose("tool", "paint"), e: () => choose("tool", "erase"),
    m: () => choose("show", "mask"), v: () => choose("show", "volume"), o: () => choose("show", "overlay"),
    w: () => windows.next(),
    "[": () => { byId("radius").value = Number(byId("radius").value) - 2; tellRadius(); },
    "]": () => { byId("radius").value = Number(byId("radius").value) + 2; tellRadius(); },
  };
  if (event.ctrlKey) {
    if (key !== "z") return;
    viewer.undo();
  } else if (/^\d$/.test(key)) choose("label", key);
  else if (key in acts) acts[key]();
  else return;
  event.preventDefault();
}

attempt(begin);
