// Jobs: sent, followed while they are made, shown, downloaded, removed.

import { made } from "./controls.js";
import { readNifti } from "./nifti.js";
import { asked, sentence } from "./signin.js";

const byId = (id) => document.getElementById(id);

export class Jobs {
  /** `show(job)` is called when a job that was sent here is done. */
  constructor({ show, removed, refused }) {
    Object.assign(this, { show, removed, refused });
    this.known = new Map();
  }

  async load() {
    for (const job of (await (await asked("/api/jobs")).json()).reverse()) {
      this.known.set(job.id, job);
      if (job.state === "waiting" || job.state === "running") this.follow(job, false);
    }
    this.render();
  }

  async send(mask, { options, files }) {
    const form = new FormData();
    form.append("mask", mask, "mask");
    form.append("options", JSON.stringify(options));
    for (const [name, file] of Object.entries(files)) form.append(name, file, name);
    const job = await (await asked("/api/jobs", { method: "POST", body: form })).json();
    this.seen(job);
    if (job.state === "done") this.show(job);
    else this.follow(job, true);
  }

  seen(job) {
    this.known.set(job.id, job);
    this.render();
  }

  /** Until it is done or refused; of those that were sent from here the end is shown. */
  follow(job, ours) {
    const events = new EventSource(`/api/jobs/${job.id}/events`);
    const began = Date.now();
    if (ours) this.current = job.id;
    const tell = () => {
      if (this.current === job.id) this.progress(this.known.get(job.id), (Date.now() - began) / 1000);
    };
    const timer = setInterval(tell, 1000);
    const end = () => {
      clearInterval(timer);
      events.close();
      if (this.current === job.id) {
        this.current = null;
        byId("progress").hidden = true;
      }
    };
    events.addEventListener("job", (event) => {
      const now = JSON.parse(event.data);
      this.seen(now);
      tell();
      if (now.state !== "done" && now.state !== "refused") return;
      end();
      if (!ours) return;
      if (now.state === "done") this.show(now);
      else this.refused(now.error);
    });
    events.addEventListener("removed", () => {
      end();
      this.known.delete(job.id);
      this.render();
    });
    tell();
  }

  progress(job, seconds) {
    const bar = byId("bar");
    byId("progress").hidden = false;
    const waits = job.state === "waiting";
    const told = waits ? `waiting, ${job.before} ${job.before === 1 ? "job" : "jobs"} before it` : `volume ${Math.min(job.made + 1, job.count)} of ${job.count}`;
    byId("progress-told").textContent = `${told}, ${Math.round(seconds)} s`;
    if (waits || job.made === 0) bar.removeAttribute("value");
    else bar.value = job.made / job.count;
  }

  render() {
    const jobs = [...this.known.values()].sort((one, other) => other.submitted - one.submitted);
    byId("no-jobs").hidden = jobs.length > 0;
    byId("jobs").replaceChildren(...jobs.map((job) => this.row(job)));
  }

  row(job) {
    const told = made("div", {}, made("span", { className: "state" }, job.state), ` · ${described(job)} · ${clock(job.submitted)}`);
    if (job.error) told.append(made("div", { className: "refused" }, sentence(job.error)));
    const row = made("li", {}, told);
    const named = (text) => ({ "aria-label": `${text}: ${described(job)}, ${clock(job.submitted)}` });
    if (job.state === "done") {
      if (job.mask) row.append(button("View", named("View"), () => this.show(job)));
      for (const volume of job.volumes)
        row.append(link(job.volumes.length > 1 ? `Volume ${volume.number + 1}` : "Volume", volume.address, named(`Download volume ${volume.number + 1}`)));
      row.append(link("All files", `/api/jobs/${job.id}/results`, named("Download all files")));
    }
    if (job.state !== "running") row.append(button("Delete", named("Delete"), () => this.remove(job)));
    return row;
  }

  async remove(job) {
    if (!confirm("Delete this job and its volumes?")) return;
    try {
      await asked(`/api/jobs/${job.id}`, { method: "DELETE" });
      this.known.delete(job.id);
      this.render();
      this.removed(job);
    } catch (error) {
      this.refused(error);
    }
  }
}

/** Mask and volumes of a job, read. */
export async function loaded(job, units) {
  const read = async (address) => readNifti(await (await asked(address)).arrayBuffer());
  const mask = await read(job.mask);
  const volumes = [];
  for (const volume of job.volumes) {
    const told = `seed ${job.asked.seed ?? "default"}${job.volumes.length > 1 ? ` · ${volume.number + 1}` : ""}`;
    volumes.push({ id: volume.address, job: job.id, told, units, volume: await read(volume.address) });
  }
  return { mask, volumes };
}

function described(job) {
  const { asked: options } = job;
  const words = [`${job.count} ${job.count === 1 ? "volume" : "volumes"}`];
  for (const name of ["seed", "steps", "guidance"]) if (name in options) words.push(`${name} ${options[name]}`);
  for (const [name, value] of Object.entries(options.covariates ?? {})) words.push(`${name} ${value}`);
  for (const name of Object.keys(options.conditions ?? {})) words.push(name);
  if (options.format === "dicom") words.push("DICOM");
  return words.join(", ");
}

function clock(seconds) {
  return new Date(seconds * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "medium" });
}

function button(text, attributes, act) {
  const element = made("button", { type: "button" }, text);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.addEventListener("click", act);
  return element;
}

function link(text, address, attributes) {
  const element = made("a", { className: "button", href: address, download: "" }, text);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
