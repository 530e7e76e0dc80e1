"use strict";
// Slices by hand. Volumes are (X, Y, Z) with X fastest, on RAS+ axes unless their letters say otherwise.
(() => {
  const viewer = document.getElementById("viewer");
  if (!viewer || typeof DecompressionStream === "undefined") return;
  const told = JSON.parse(document.getElementById("volumes").textContent);
  const AXES = [[0, 1, 2], [0, 2, 1], [1, 2, 0]]; // across, whose high end is on the left; up; through
  const element = (name, more = {}) => Object.assign(document.createElement(name), more);
  const kept = new Map();
  let asked = 0;

  async function voxels(name) {
    if (!kept.has(name)) {
      const bytes = Uint8Array.from(atob(document.getElementById(name).textContent), (letter) => letter.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      kept.set(name, new Response(stream).arrayBuffer().then((buffer) => new Uint8Array(buffer)));
    }
    return kept.get(name);
  }

  const colours = Object.fromEntries(Object.entries(told.labels).map(([value, { colour }]) =>
    [value, [1, 3, 5].map((place) => parseInt(colour.slice(place, place + 2), 16))]));
  const choice = document.getElementById("case");
  const opacity = document.getElementById("opacity");
  const sliders = told.planes.map((plane) => document.getElementById(`at-${plane}`));
  told.cases.forEach(({ name }, number) => choice.append(element("option", { value: number, textContent: name })));

  function draw(view, plane, canvas, grey, labels) {
    const [across, up, through] = AXES[plane];
    const { shape } = view;
    const steps = [1, shape[0], shape[0] * shape[1]];
    const at = Math.round(sliders[plane].value / 100 * (shape[through] - 1));
    const [width, height] = [shape[across], shape[up]];
    const picture = new ImageData(width, height);
    const seen = grey ? opacity.value / 100 : 1;
    for (let row = 0; row < height; row++) {
      for (let column = 0; column < width; column++) {
        const voxel = (width - 1 - column) * steps[across] + (height - 1 - row) * steps[up] + at * steps[through];
        const colour = labels && colours[labels[voxel]];
        const value = grey ? grey[voxel] : 0;
        const pixel = 4 * (row * width + column);
        for (let part = 0; part < 3; part++) {
          picture.data[pixel + part] = colour ? value + seen * (colour[part] - value) : value;
        }
        picture.data[pixel + 3] = 255;
      }
    }
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").putImageData(picture, 0, 0);
    canvas.setAttribute("aria-label", `${view.what}, ${told.planes[plane]} slice ${at + 1} of ${shape[through]}`);
    return `${at + 1}/${shape[through]}`;
  }

  function panel(view) {
    const box = element("section", { className: "view" });
    box.append(element("h4", { textContent: view.what }));
    const slices = element("div", { className: "slices" });
    const canvases = view.letters.map((letters, plane) => {
      const slice = element("div", { className: "slice" });
      const canvas = element("canvas");
      canvas.setAttribute("role", "img");
      const [across, up] = AXES[plane];
      canvas.style.aspectRatio = `${view.shape[across] * view.spacing[across]} / ${view.shape[up] * view.spacing[up]}`;
      slice.append(canvas, ...["left", "right", "top", "bottom"].map((side, place) =>
        element("span", { className: side, textContent: letters[place] })));
      slices.append(slice);
      return canvas;
    });
    box.append(slices);
    return { box, canvases };
  }

  let redraw = () => {};

  async function show() {
    const mine = ++asked;
    const views = told.cases[choice.value].views;
    const read = await Promise.all(views.map(async (view) => [
      view.voxels && await voxels(view.voxels), view.labels && await voxels(view.labels)]));
    if (mine !== asked) return;
    const panels = views.map(panel);
    document.getElementById("views").replaceChildren(...panels.map(({ box }) => box));
    told.planes.forEach((_, plane) => { sliders[plane].value = 100 * views[0].at[AXES[plane][2]]; });
    redraw = () => views.forEach((view, number) => panels[number].canvases.forEach((canvas, plane) => {
      const where = draw(view, plane, canvas, ...read[number]);
      if (number === 0) document.getElementById(`out-${told.planes[plane]}`).textContent = where;
    }));
    redraw();
    const coarse = views.filter((view) => view.coarse > 1).map((view) =>
      `${view.what} is shown with blocks of ${view.coarse} voxels along each axis as one`);
    document.getElementById("viewer-note").textContent = coarse.join("; ");
    document.dispatchEvent(new CustomEvent("fibldm-shown"));
  }

  choice.addEventListener("change", show);
  [...sliders, opacity].forEach((slider) => slider.addEventListener("input", () => redraw()));
  window.fibldmViewer = { views: () => told.cases[choice.value].views, voxels, labels: told.labels };
  viewer.hidden = false;
  show();
})();
