// Three planes and 3-D by NiiVue, on demand; without WebGL 2 the slices stay.
{
  const button = document.getElementById("space");
  const said = document.getElementById("viewer-note");
  let shown = [];

  function nifti(view, voxels, isLabels) {
    const file = new ArrayBuffer(352 + voxels.length);
    const header = new DataView(file);
    const shorts = { 40: 3, 42: view.shape[0], 44: view.shape[1], 46: view.shape[2], 48: 1, 50: 1, 52: 1, 54: 1 };
    Object.entries({ ...shorts, 68: isLabels ? 1002 : 0, 70: 2, 72: 8, 254: 1 }).forEach(([at, value]) =>
      header.setInt16(Number(at), value, true));
    header.setInt32(0, 348, true);
    [1, ...view.spacing].forEach((value, place) => header.setFloat32(76 + 4 * place, value, true));
    header.setFloat32(108, 352, true);
    header.setFloat32(112, 1, true);
    header.setUint8(123, 2);
    if (!isLabels) header.setFloat32(124, 255, true);
    view.affine.slice(0, 12).forEach((value, place) => header.setFloat32(280 + 4 * place, value, true));
    [0x6e, 0x2b, 0x31, 0].forEach((letter, place) => header.setUint8(344 + place, letter));
    new Uint8Array(file, 352).set(voxels);
    return URL.createObjectURL(new Blob([file]));
  }

  function colours(labels) {
    const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: ["background"] };
    for (const [value, { name, colour }] of Object.entries(labels)) {
      [1, 3, 5].forEach((place, part) => table["RGB"[part]].push(parseInt(colour.slice(place, place + 2), 16)));
      table.A.push(255);
      table.I.push(Number(value));
      table.labels.push(name);
    }
    return table;
  }

  async function add(view) {
    const { voxels, labels } = window.fibldmViewer;
    const box = document.createElement("section");
    box.className = "view";
    const title = document.createElement("h4");
    title.textContent = `${view.what}, 3-D`;
    const place = document.createElement("div");
    place.className = "space";
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${view.what} in three planes and 3-D; the slices beside show the same`);
    place.append(canvas);
    box.append(title, place);
    document.getElementById("space-views").append(box);
    const niivue = new FibldmNiivue({
      isRadiologicalConvention: true, sagittalNoseLeft: true, dragAndDropEnabled: false, multiplanarShowRender: 1,
      isNearestInterpolation: true, multiplanarLayout: 2, showAllOrientationMarkers: true,
      fontColor: [1, 0.88, 0.54, 1], fontMinPx: 16, crosshairWidth: 0.4, crosshairColor: [0.4, 0.7, 1, 0.6], backColor: [0, 0, 0, 1], loadingText: "", logLevel: "error",
    });
    shown.push({ niivue, box });
    await niivue.attachToCanvas(canvas);
    const layers = [];
    if (view.voxels) layers.push({ url: nifti(view, await voxels(view.voxels), false), name: "volume.nii", colormap: "gray", cal_min: 0, cal_max: 255 });
    if (view.labels) layers.push({ url: nifti(view, await voxels(view.labels), true), name: "labels.nii", opacity: view.voxels ? 0.4 : 1 });
    await niivue.loadVolumes(layers);
    layers.forEach(({ url }) => URL.revokeObjectURL(url));
    if (view.labels) niivue.volumes[layers.length - 1].setColormapLabel(colours(labels));
    niivue.updateGLVolume();
    niivue.setSliceType(niivue.sliceTypeMultiplanar);
  }

  function remove() {
    shown.forEach(({ niivue, box }) => {
      niivue.gl?.getExtension("WEBGL_lose_context")?.loseContext();
      box.remove();
    });
    shown = [];
  }

  async function toggle(wanted) {
    button.setAttribute("aria-pressed", String(wanted));
    remove();
    if (!wanted) return;
    said.textContent = "loading 3-D";
    try {
      for (const view of window.fibldmViewer.views()) await add(view);
      said.textContent = "";
    } catch (error) {
      remove();
      button.setAttribute("aria-pressed", "false");
      said.textContent = `3-D is not possible here: ${error.message}`;
    }
  }

  if (button && window.fibldmViewer) {
    if (document.createElement("canvas").getContext("webgl2")) {
      button.addEventListener("click", () => toggle(button.getAttribute("aria-pressed") !== "true"));
      document.addEventListener("fibldm-shown", () => toggle(button.getAttribute("aria-pressed") === "true"));
    } else {
      button.hidden = true;
      said.textContent = "3-D needs WebGL 2, which this browser does not give.";
    }
  }
}
