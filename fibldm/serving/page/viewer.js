// The three planes, the strip of volumes side by side, and what pointer, wheel and keys do in them.

import { Drawing } from "./drawing.js";
import { PLANES, Space, drawSlice, placeAt } from "./slices.js";

const byId = (id) => document.getElementById(id);
const NAMES = { axial: "Axial", coronal: "Coronal", sagittal: "Sagittal" };

export class Viewer {
  constructor({ labelNames, onEdit, onHover }) {
    Object.assign(this, { labelNames, onEdit, onHover });
    this.mask = this.space = this.drawing = null;
    this.volumes = [];
    this.active = null;
    this.place = [0, 0, 0];
    this.plane = "axial";
    this.window = { centre: 0, width: 1 };
    this.channel = 0;
    this.figures = [...document.querySelectorAll("#planes figure")].map((figure) => this.prepared(figure));
    new ResizeObserver(() => this.draw()).observe(byId("planes"));
    for (const radio of document.querySelectorAll("[name=show]")) radio.addEventListener("change", () => this.draw());
    byId("opacity").addEventListener("input", () => this.draw());
  }

  get show() {
    return document.querySelector("[name=show]:checked").value;
  }

  set show(value) {
    const radio = document.querySelector(`[name=show][value=${value}]`);
    if (!radio.disabled) radio.checked = true;
    this.draw();
  }

  get tool() {
    return document.querySelector("[name=tool]:checked").value;
  }

  get brush() {
    const chosen = document.querySelector("[name=label]:checked");
    const label = this.tool === "erase" || !chosen ? 0 : Number(chosen.value);
    return { label, radius: Number(byId("radius").value), ball: byId("ball").checked };
  }

  /** Show a mask, with no volume yet, from its middle. */
  setMask(mask) {
    const space = new Space(mask);
    const elsewhere = !this.space || !space.sameAs(this.space);
    Object.assign(this, { mask, space, drawing: new Drawing(mask, space), volumes: [], active: null });
    if (elsewhere) this.place = middleOf(mask, space);
    for (const { plane, slider } of this.figures) slider.max = space.size[PLANES[plane].through] - 1;
    this.showVolumes();
  }

  /** Show volumes `{id, told, volume}` of the mask's grid beside those that are there. */
  addVolumes(added) {
    for (const one of added) {
      if (!new Space(one.volume).sameAs(this.space)) throw new Error("a volume must lie on the grid of its mask; this one does not");
      if (!this.volumes.some((other) => other.id === one.id)) this.volumes.push(one);
    }
    this.active = added[0] ?? this.active;
    this.showVolumes();
  }

  removeVolumes(job) {
    this.volumes = this.volumes.filter((one) => one.job !== job);
    if (!this.volumes.includes(this.active)) this.active = this.volumes[0] ?? null;
    this.showVolumes();
  }

  showVolumes() {
    const any = this.volumes.length > 0;
    for (const name of ["volume", "overlay"]) document.querySelector(`[name=show][value=${name}]`).disabled = !any;
    if (!any) document.querySelector("[name=show][value=mask]").checked = true;
    byId("side").hidden = !any;
    const strip = byId("strip");
    strip.replaceChildren();
    this.tiles = any ? [null, ...this.volumes].map((one) => this.tile(one, strip)) : [];
    this.draw();
  }

  tile(one, strip) {
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    const told = document.createElement("span");
    button.type = "button";
    told.textContent = one ? one.told : "mask";
    button.append(canvas, told);
    button.addEventListener("click", () => {
      if (one) this.active = one;
      this.show = one ? (this.show === "overlay" ? "overlay" : "volume") : "mask";
    });
    strip.append(button);
    return { one, button, canvas };
  }

  /** The voxels of a volume's channel. */
  voxels(one) {
    const { size, channels, data } = one.volume;
    if (channels === 1) return data;
    const count = size[0] * size[1] * size[2];
    return data.subarray(this.channel * count, (this.channel + 1) * count);
  }

  draw() {
    if (!this.mask || this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.drawNow();
    });
  }

  drawNow() {
    const { space, place, window } = this;
    const opacity = Number(byId("opacity").value);
    const grey = this.show !== "mask" && this.active ? this.voxels(this.active) : null;
    const shared = { space, place, window, opacity };
    for (const { plane, canvas, slider, title } of this.figures) {
      const { through } = PLANES[plane];
      const labels = this.show === "volume" ? null : this.mask.data;
      drawSlice(canvas, plane, { ...shared, volume: grey, mask: labels, note: grey ? "SYNTHETIC" : "" });
      slider.value = place[through];
      const told = `${place[through] + 1} of ${space.size[through]}`;
      title.textContent = `${NAMES[plane]} ${told}`;
      slider.setAttribute("aria-valuetext", told);
    }
    for (const { one, button, canvas } of this.tiles ?? []) {
      const labels = one && this.show !== "overlay" ? null : this.mask.data;
      const volume = one ? this.voxels(one) : null;
      drawSlice(canvas, this.plane, { ...shared, volume, mask: labels, cross: false, note: one ? "SYNTHETIC" : "" });
      button.setAttribute("aria-pressed", one ? this.show !== "mask" && one === this.active : this.show === "mask");
    }
    this.onHover(this.told(place));
  }

  /** A voxel in words. */
  told(place) {
    const offset = this.space.offset(place);
    const [r, a, s] = this.space.millimetres(place);
    const side = (value, one, other) => `${value < 0 ? other : one} ${Math.abs(value).toFixed(1)}`;
    const label = this.mask.data[offset];
    const words = [`${side(r, "R", "L")}, ${side(a, "A", "P")}, ${side(s, "S", "I")} mm`];
    words.push(`label ${label} ${this.labelNames[label] ?? (label === 255 ? "unknown" : "")}`.trim());
    for (const one of this.volumes) words.push(`${one.told}: ${round(this.voxels(one)[offset])}${one.units ? ` ${one.units}` : ""}`);
    return words.join(" · ");
  }

  prepared(figure) {
    const { plane } = figure.dataset;
    const [canvas, slider, title] = ["canvas", "input", "figcaption span"].map((name) => figure.querySelector(name));
    slider.min = 0;
    slider.addEventListener("input", () => this.move(plane, PLANES[plane].through, Number(slider.value)));
    canvas.addEventListener("pointerdown", (event) => this.press(event, canvas, plane));
    canvas.addEventListener("pointermove", (event) => this.drag(event, canvas, plane));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.release());
    canvas.addEventListener("wheel", (event) => this.wheel(event, plane), { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event, plane));
    canvas.addEventListener("focus", () => { this.plane = plane; this.draw(); });
    return { plane, canvas, slider, title };
  }

  press(event, canvas, plane) {
    if (!this.mask || event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    this.plane = plane;
    this.held = pointed(event, canvas, this.space, plane, this.place);
    if (this.tool !== "look") {
      this.drawing.begin();
      this.drawing.dab(this.held, plane, this.brush);
    }
    this.place = this.held;
    this.draw();
  }

  drag(event, canvas, plane) {
    if (!this.held || !canvas.hasPointerCapture(event.pointerId)) return;
    const place = pointed(event, canvas, this.space, plane, this.place);
    if (this.tool !== "look") this.drawing.line(this.held, place, plane, this.brush);
    this.held = this.place = place;
    this.draw();
  }

  release() {
    if (this.held && this.drawing.current) {
      this.drawing.end();
      this.onEdit();
    }
    this.held = null;
  }

  wheel(event, plane) {
    if (!this.mask || event.ctrlKey) return; // the browser's zoom
    event.preventDefault();
    const { through } = PLANES[plane];
    this.move(plane, through, this.place[through] - Math.sign(event.deltaY));
  }

  key(event, plane) {
    if (!this.mask) return;
    const { across, up, through } = PLANES[plane];
    const step = event.shiftKey ? 10 : 1;
    const moves = {
      ArrowLeft: [across, step], ArrowRight: [across, -step], ArrowUp: [up, step], ArrowDown: [up, -step],
      PageUp: [through, step], PageDown: [through, -step],
    };
    if (event.key in moves) {
      const [axis, by] = moves[event.key];
      this.move(plane, axis, this.place[axis] + by);
    } else if (event.key === " " && this.tool !== "look") {
      this.drawing.begin();
      this.drawing.dab(this.place, plane, this.brush);
      this.drawing.end();
      this.onEdit();
      this.draw();
    } else return;
    event.preventDefault();
  }

  move(plane, axis, value) {
    if (!this.mask) return;
    this.plane = plane;
    this.place = [...this.place];
    this.place[axis] = Math.min(this.space.size[axis] - 1, Math.max(0, value));
    this.draw();
  }

  undo() {
    if (!this.drawing?.undo()) return;
    this.onEdit();
    this.draw();
  }
}

function pointed(event, canvas, space, plane, place) {
  const box = canvas.getBoundingClientRect();
  const point = {
    x: ((event.clientX - box.left) * canvas.width) / box.width,
    y: ((event.clientY - box.top) * canvas.height) / box.height,
  };
  return placeAt(canvas, space, plane, point, place);
}

/** The middle of what is labelled, as a first look at an edge shows nothing. */
function middleOf(mask, space) {
  const low = [...space.size];
  const high = [-1, -1, -1];
  const place = [0, 0, 0];
  for (place[0] = 0; place[0] < space.size[0]; place[0]++)
    for (place[1] = 0; place[1] < space.size[1]; place[1]++)
      for (place[2] = 0; place[2] < space.size[2]; place[2]++)
        if (mask.data[space.offset(place)])
          for (let axis = 0; axis < 3; axis++) {
            low[axis] = Math.min(low[axis], place[axis]);
            high[axis] = Math.max(high[axis], place[axis]);
          }
  return space.size.map((length, axis) => Math.floor(high[axis] < 0 ? length / 2 : (low[axis] + high[axis]) / 2));
}

function round(value) {
  return Math.abs(value) >= 100 ? Math.round(value) : Number(value.toPrecision(3));
}
