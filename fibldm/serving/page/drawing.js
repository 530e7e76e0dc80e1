// Labels painted and erased with a brush, stroke by stroke, each of which can be taken back.

import { PLANES } from "./slices.js";

const MOST_STROKES = 50;

export class Drawing {
  constructor(mask, space) {
    this.mask = mask;
    this.space = space;
    this.strokes = [];
    this.current = null;
  }

  get edited() {
    return this.strokes.length > 0;
  }

  begin() {
    this.current = new Map();
  }

  /** Paint around a voxel: a disc in its plane, or a ball; `radius` in mm, of which the voxel itself is part. */
  dab(place, plane, { label, radius, ball }) {
    const { through } = PLANES[plane];
    const reach = this.space.spacing.map((step, axis) => (axis === through && !ball ? 0 : Math.floor(radius / step)));
    for (let r = -reach[0]; r <= reach[0]; r++)
      for (let a = -reach[1]; a <= reach[1]; a++)
        for (let s = -reach[2]; s <= reach[2]; s++) this.set([r, a, s], place, label, radius);
  }

  /** Dabs from one voxel to another, so that a quick hand leaves no gaps. */
  line(from, to, plane, brush) {
    const steps = Math.max(1, ...from.map((value, axis) => Math.abs(to[axis] - value)));
    for (let n = 0; n <= steps; n++)
      this.dab(from.map((value, axis) => Math.round(value + ((to[axis] - value) * n) / steps)), plane, brush);
  }

  set(step, place, label, radius) {
    if (Math.hypot(...step.map((value, axis) => value * this.space.spacing[axis])) > radius) return;
    const at = place.map((value, axis) => value + step[axis]);
    if (at.some((value, axis) => value < 0 || value >= this.space.size[axis])) return;
    const offset = this.space.offset(at);
    if (this.mask.data[offset] === label) return;
    if (!this.current.has(offset)) this.current.set(offset, this.mask.data[offset]);
    this.mask.data[offset] = label;
  }

  end() {
    if (this.current?.size) this.strokes.push(this.current);
    if (this.strokes.length > MOST_STROKES) this.strokes.splice(1, 1); // the first one tells that there is a change
    this.current = null;
  }

  undo() {
    const last = this.strokes.pop();
    if (last) for (const [offset, label] of last) this.mask.data[offset] = label;
    return Boolean(last);
  }
}
