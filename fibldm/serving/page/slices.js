// Where voxels lie in the patient, and slices of them on a canvas. Axes are R, A and S: to the patient's right, front, head.

export const PLANES = {
  axial: { across: 0, up: 1, through: 2, letters: ["R", "L", "A", "P"] },
  coronal: { across: 0, up: 2, through: 1, letters: ["R", "L", "S", "I"] },
  sagittal: { across: 1, up: 2, through: 0, letters: ["A", "P", "S", "I"] },
};

const ORDERS = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

// Told apart by people who do not see all colours (Okabe and Ito), on black.
const COLOURS = [
  [0, 0, 0], [86, 180, 233], [230, 159, 0], [0, 158, 115], [240, 228, 66], [213, 94, 0], [204, 121, 167],
  [0, 114, 178], [190, 190, 190], [120, 94, 240], [100, 143, 60],
];
const UNKNOWN = [128, 128, 128];

/** The colour of a label, [r, g, b]. */
export function colourOf(label) {
  if (label === 0) return COLOURS[0];
  return label === 255 ? UNKNOWN : COLOURS[((label - 1) % (COLOURS.length - 1)) + 1];
}

/** The grid of a volume as R, A, S: how many voxels, how large, and where in its array each of them is. */
export class Space {
  constructor({ size, affine }) {
    this.affine = affine;
    const lengths = [0, 1, 2].map((axis) => Math.hypot(...affine.map((row) => row[axis])));
    const along = (world, axis) => affine[world][axis] / lengths[axis];
    const fit = (order) => order.reduce((product, axis, world) => product * Math.abs(along(world, axis)), 1);
    this.axes = ORDERS.reduce((best, order) => (fit(order) > fit(best) + 1e-9 ? order : best));
    const steps = [1, size[0], size[0] * size[1]];
    this.size = this.axes.map((axis) => size[axis]);
    this.spacing = this.axes.map((axis) => lengths[axis]);
    this.turned = this.axes.map((axis, world) => along(world, axis) < 0);
    this.steps = this.axes.map((axis, world) => (this.turned[world] ? -1 : 1) * steps[axis]);
    this.first = this.axes.reduce((sum, axis, world) => sum + (this.turned[world] ? (size[axis] - 1) * steps[axis] : 0), 0);
    const straightness = Math.min(...this.axes.map((axis, world) => Math.abs(along(world, axis))));
    this.degreesOff = (Math.acos(Math.min(1, straightness)) * 180) / Math.PI;
  }

  offset(place) {
    return this.first + place[0] * this.steps[0] + place[1] * this.steps[1] + place[2] * this.steps[2];
  }

  millimetres(place) {
    const index = [0, 0, 0];
    this.axes.forEach((axis, world) => {
      index[axis] = this.turned[world] ? this.size[world] - 1 - place[world] : place[world];
    });
    return this.affine.map((row) => row[0] * index[0] + row[1] * index[1] + row[2] * index[2] + row[3]);
  }

  sameAs(other) {
    const near = (one, two) => Math.abs(one - two) < 1e-3;
    return this.size.every((length, n) => length === other.size[n])
      && this.affine.every((row, n) => row.every((value, m) => near(value, other.affine[n][m])));
  }
}

/** Where a plane lies on a canvas: pixels for each voxel, and the corner. */
export function frameOf(canvas, space, plane) {
  const { across, up } = PLANES[plane];
  const width = space.size[across] * space.spacing[across];
  const height = space.size[up] * space.spacing[up];
  const scale = Math.min(canvas.width / width, canvas.height / height);
  return {
    left: (canvas.width - width * scale) / 2, top: (canvas.height - height * scale) / 2,
    width: width * scale, height: height * scale,
    x: scale * space.spacing[across], y: scale * space.spacing[up],
  };
}

/** The voxel under a point of a canvas, in its plane; outside of it the nearest. */
export function placeAt(canvas, space, plane, point, place) {
  const { across, up } = PLANES[plane];
  const frame = frameOf(canvas, space, plane);
  const found = [...place];
  const inside = (value, length) => Math.min(length - 1, Math.max(0, value));
  found[across] = inside(space.size[across] - 1 - Math.floor((point.x - frame.left) / frame.x), space.size[across]);
  found[up] = inside(space.size[up] - 1 - Math.floor((point.y - frame.top) / frame.y), space.size[up]);
  return found;
}

/** Draw a plane: grey values of a volume, labels of a mask, or both; the patient's right is on the left. */
export function drawSlice(canvas, plane, { space, place, volume, mask, window, opacity, cross = true, note = "" }) {
  fit(canvas);
  const context = canvas.getContext("2d");
  context.fillStyle = "#000";
  context.fillRect(0, 0, canvas.width, canvas.height);
  const frame = frameOf(canvas, space, plane);
  context.imageSmoothingEnabled = false;
  context.drawImage(pixels(plane, space, place, volume, mask, window, opacity), frame.left, frame.top, frame.width, frame.height);
  if (cross) drawCross(context, frame, plane, space, place);
  drawLetters(context, canvas, plane, note);
}

function fit(canvas) {
  const ratio = globalThis.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
}

let scratch;

function pixels(plane, space, place, volume, mask, window, opacity) {
  const { across, up, through } = PLANES[plane];
  const [width, height] = [space.size[across], space.size[up]];
  scratch ??= document.createElement("canvas");
  scratch.width = width;
  scratch.height = height;
  const context = scratch.getContext("2d");
  const image = context.createImageData(width, height);
  const start = space.first + place[through] * space.steps[through];
  const low = window.centre - window.width / 2;
  const gain = 255 / Math.max(window.width, 1e-9);
  const share = volume ? opacity : 1;
  let at = 0;
  for (let y = 0; y < height; y++) {
    let offset = start + (height - 1 - y) * space.steps[up] + (width - 1) * space.steps[across];
    for (let x = 0; x < width; x++, at += 4, offset -= space.steps[across]) {
      const grey = volume ? Math.min(255, Math.max(0, (volume[offset] - low) * gain)) : 0;
      const label = mask ? mask[offset] : 0;
      const tint = label ? colourOf(label) : null;
      for (let c = 0; c < 3; c++) image.data[at + c] = tint ? grey * (1 - share) + tint[c] * share : grey;
      image.data[at + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
  return scratch;
}

function drawCross(context, frame, plane, space, place) {
  const { across, up } = PLANES[plane];
  const x = frame.left + (space.size[across] - 1 - place[across] + 0.5) * frame.x;
  const y = frame.top + (space.size[up] - 1 - place[up] + 0.5) * frame.y;
  const ratio = globalThis.devicePixelRatio || 1;
  context.strokeStyle = "rgba(255, 220, 90, 0.75)";
  context.lineWidth = ratio;
  const gap = 6 * ratio;
  context.beginPath();
  context.moveTo(frame.left, y); context.lineTo(Math.max(frame.left, x - gap), y);
  context.moveTo(Math.min(frame.left + frame.width, x + gap), y); context.lineTo(frame.left + frame.width, y);
  context.moveTo(x, frame.top); context.lineTo(x, Math.max(frame.top, y - gap));
  context.moveTo(x, Math.min(frame.top + frame.height, y + gap)); context.lineTo(x, frame.top + frame.height);
  context.stroke();
}

function drawLetters(context, canvas, plane, note) {
  const ratio = globalThis.devicePixelRatio || 1;
  const [left, right, top, bottom] = PLANES[plane].letters;
  const edge = 5 * ratio;
  const write = (text, x, y, align, baseline) => {
    context.textAlign = align;
    context.textBaseline = baseline;
    context.lineWidth = 3 * ratio;
    context.strokeStyle = "#000";
    context.strokeText(text, x, y);
    context.fillText(text, x, y);
  };
  context.font = `600 ${13 * ratio}px system-ui, sans-serif`;
  context.fillStyle = "#ffdc5a";
  write(left, edge, canvas.height / 2, "left", "middle");
  write(right, canvas.width - edge, canvas.height / 2, "right", "middle");
  write(top, canvas.width / 2, edge, "center", "top");
  write(bottom, canvas.width / 2, canvas.height - edge, "center", "bottom");
  if (note) {
    context.font = `600 ${11 * ratio}px system-ui, sans-serif`;
    context.fillStyle = "#fff";
    write(note, edge, canvas.height - edge, "left", "bottom");
  }
}
