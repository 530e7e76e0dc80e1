// NIfTI-1 and -2 as the studio writes them: read in the browser, and masks written back.

const TYPES = {
  2: ["Uint8", 1], 256: ["Int8", 1], 4: ["Int16", 2], 512: ["Uint16", 2],
  8: ["Int32", 4], 768: ["Uint32", 4], 16: ["Float32", 4], 64: ["Float64", 8],
};

/** Bytes of a file, decompressed where they are gzip. */
export async function unpacked(buffer) {
  const start = new Uint8Array(buffer, 0, Math.min(2, buffer.byteLength));
  if (start[0] !== 0x1f || start[1] !== 0x8b) return buffer;
  return new Response(new Blob([buffer]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

/** A volume: `size` [i, j, k], `channels`, `affine` (rows of voxel to RAS+ mm), `data` in units, `head` as bytes. */
export async function readNifti(packed) {
  const buffer = await unpacked(packed);
  const view = new DataView(buffer);
  const little = [348, 540].includes(view.getInt32(0, true));
  const first = view.getInt32(0, little);
  if (first !== 348 && first !== 540) throw new Error("a volume must be NIfTI; this one is not");
  const header = first === 348 ? headerOf1(view, little) : headerOf2(view, little);
  if (!(header.type in TYPES)) throw new Error(`voxels of NIfTI type ${header.type} cannot be shown`);
  const [i, j, k] = header.shape;
  const channels = header.shape.slice(3).reduce((product, length) => product * Math.max(length, 1), 1);
  const data = voxels(view, header, i * j * k * channels, little);
  return { size: [i, j, k], channels, affine: header.affine, data, head: buffer.slice(0, header.offset) };
}

/** A mask with other labels, as gzip; what its header says stays. */
export async function writeMask(mask) {
  const head = mask.head.slice(0);
  const stream = new Blob([head, mask.data]).stream().pipeThrough(new CompressionStream("gzip"));
  return new Blob([await new Response(stream).arrayBuffer()], { type: "application/gzip" });
}

function voxels(view, header, count, little) {
  const [kind, width] = TYPES[header.type];
  if (view.byteLength < header.offset + count * width) throw new Error("a volume must be whole; this one is cut off");
  const scaled = header.slope !== 0 && (header.slope !== 1 || header.inter !== 0);
  const array = new globalThis[`${kind}Array`](count);
  const get = `get${kind}`;
  const native = little && header.offset % width === 0;
  if (native) array.set(new globalThis[`${kind}Array`](view.buffer, header.offset, count));
  else for (let n = 0; n < count; n++) array[n] = view[get](header.offset + n * width, little);
  return scaled ? Float32Array.from(array, (value) => value * header.slope + header.inter) : array;
}

function headerOf1(view, little) {
  const short = (at) => view.getInt16(at, little);
  const float = (at) => view.getFloat32(at, little);
  const axes = short(40);
  return {
    shape: shapeOf(axes, (n) => short(40 + 2 * n)),
    type: short(70),
    offset: Math.max(352, Math.round(float(108))),
    slope: float(112),
    inter: float(116),
    affine: affineOf({
      sform: short(254) > 0, qform: short(252) > 0,
      rows: [280, 296, 312].map((at) => [0, 4, 8, 12].map((step) => float(at + step))),
      pixdim: [0, 1, 2, 3].map((n) => float(76 + 4 * n)),
      quaternion: [256, 260, 264].map(float), shift: [268, 272, 276].map(float),
    }),
  };
}

function headerOf2(view, little) {
  const double = (at) => view.getFloat64(at, little);
  const long = (at) => Number(view.getBigInt64(at, little));
  return {
    shape: shapeOf(long(16), (n) => long(16 + 8 * n)),
    type: view.getInt16(12, little),
    offset: Math.max(544, long(168)),
    slope: double(176),
    inter: double(184),
    affine: affineOf({
      sform: view.getInt32(348, little) > 0, qform: view.getInt32(344, little) > 0,
      rows: [400, 432, 464].map((at) => [0, 8, 16, 24].map((step) => double(at + step))),
      pixdim: [0, 1, 2, 3].map((n) => double(104 + 8 * n)),
      quaternion: [352, 360, 368].map(double), shift: [376, 384, 392].map(double),
    }),
  };
}

function shapeOf(axes, length) {
  const shape = [1, 1, 1];
  for (let n = 1; n <= Math.min(axes, 7); n++) shape[n - 1] = length(n);
  if (shape.some((one) => !(one >= 1))) throw new Error("a volume must have a size; this one has none");
  return shape;
}

// The sform goes before the qform, as for nibabel.
function affineOf({ sform, qform, rows, pixdim, quaternion, shift }) {
  if (sform) return rows;
  if (!qform) return [0, 1, 2].map((n) => [0, 1, 2, 3].map((m) => (m === n ? pixdim[n + 1] || 1 : 0)));
  const [b, c, d] = quaternion;
  const rest = 1 - b * b - c * c - d * d;
  const a = Math.abs(rest) < 3.6e-7 ? 0 : Math.sqrt(Math.max(0, rest)); // single precision knows no smaller one
  const turn = [
    [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
    [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
    [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
  ];
  const side = pixdim[0] < 0 ? -1 : 1;
  return turn.map((row, n) => [row[0] * pixdim[1], row[1] * pixdim[2], row[2] * pixdim[3] * side, shift[n]]);
}
