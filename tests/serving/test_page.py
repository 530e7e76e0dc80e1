"""What the page makes of files: where voxels lie, what is left, what is drawn; run by Node, as a browser would."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

import fibldm

PAGE = Path(fibldm.__file__).parent / "serving" / "page"
NODE = shutil.which("node")
SHAPE = (5, 4, 3)

pytestmark = pytest.mark.skipif(NODE is None, reason="needs node, which runs the scripts of the page")


def page(code: str, *values: Any) -> Any:
    """What a script of the page's modules says; ``given`` are the values."""
    modules = {name: json.dumps((PAGE / f"{name}.js").as_uri()) for name in ("nifti", "slices", "drawing")}
    imports = "\n".join(f"import * as {name} from {address};" for name, address in modules.items())
    read = 'import { readFileSync, writeFileSync } from "node:fs";\n'
    read += "const bytes = (file) => new Uint8Array(readFileSync(file)).buffer;\n"
    script = f"{read}{imports}\nconst given = {json.dumps(values)};\n{code}"
    command = [str(NODE), "--no-warnings", "--input-type=module", "-e", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def turned(order: tuple[int, ...], signs: tuple[int, ...], oblique: float) -> np.ndarray[Any, Any]:
    """An affine with axes in this order, a little oblique."""
    affine = np.eye(4)
    cosine, sine = np.cos(oblique), np.sin(oblique)
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]
    )
    affine[:3, :3] = turn @ (np.eye(3)[:, list(order)] * signs * [2.0, 3.0, 5.0])
    affine[:3, 3] = [-7.0, 11.0, 13.0]
    return affine


def test_voxels_lie_where_nibabel_has_them(tmp_path: Path) -> None:
    """In every orientation, oblique too, by sform or qform, of NIfTI-1 and -2, both byte orders, scaled or not."""
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    files = []
    ways = itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3), (0.0, 0.4))
    for number, (order, signs, oblique) in enumerate(ways):
        kind = (nibabel.Nifti1Image, nibabel.Nifti2Image)[number % 2]
        image = kind(array, turned(order, signs, oblique))
        if number % 3 == 0:
            image.set_qform(image.affine, code=1)
            image.set_sform(None, code=0)
        if number % 5 == 0:
            image = kind(array, image.affine, image.header.as_byteswapped(">"))
        if number % 7 == 0:
            image.header.set_slope_inter(2.0, -3.0)
        files.append(tmp_path / f"{number}.nii{'.gz' if number % 2 else ''}")
        nibabel.save(image, files[-1])
    code = """
    const told = [];
    for (const file of given[0]) {
      const volume = await nifti.readNifti(bytes(file));
      const space = new slices.Space(volume);
      const [r, a, s] = space.size.map((length) => length - 1);
      const places = [[0, 0, 0], [r, 0, 0], [0, a, 0], [0, 0, s], [r, a, s], [1, 2, 1]];
      const mm = places.map((place) => space.millimetres(place));
      const values = places.map((place) => volume.data[space.offset(place)]);
      told.push({ size: space.size, spacing: space.spacing, places, mm, values });
    }
    console.log(JSON.stringify(told));"""
    for file, told in zip(files, page(code, list(map(str, files))), strict=True):
        wanted = nibabel.as_closest_canonical(nibabel.load(file))
        assert tuple(told["size"]) == wanted.shape
        np.testing.assert_allclose(told["spacing"], wanted.header.get_zooms(), rtol=1e-5)
        np.testing.assert_allclose(told["mm"], nibabel.affines.apply_affine(wanted.affine, told["places"]), atol=1e-3)
        values = wanted.get_fdata()
        np.testing.assert_allclose(told["values"], [values[tuple(place)] for place in told["places"]])


def test_a_mask_that_was_drawn_on_is_written_on_its_grid(tmp_path: Path) -> None:
    labels = np.zeros((9, 8, 7), dtype=np.uint8)
    affine = turned((2, 0, 1), (1, -1, 1), 0.0)
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "mask.nii.gz")
    code = """
    const mask = await nifti.readNifti(bytes(given[0]));
    const space = new slices.Space(mask);
    const drawing_ = new drawing.Drawing(mask, space);
    const stroke = (plane, brush) => {
      drawing_.begin(); drawing_.dab([2, 3, 4], plane, brush); drawing_.end();
    };
    stroke("axial", { label: 2, radius: 6, ball: false });
    stroke("axial", { label: 5, radius: 30, ball: true });
    drawing_.undo();
    writeFileSync(given[1], Buffer.from(await (await nifti.writeMask(mask)).arrayBuffer()));
    console.log(drawing_.edited);"""
    assert page(code, str(tmp_path / "mask.nii.gz"), str(tmp_path / "drawn.nii.gz")) is True
    drawn = nibabel.load(tmp_path / "drawn.nii.gz")
    np.testing.assert_allclose(drawn.affine, affine)
    assert drawn.get_data_dtype() == np.uint8
    there = nibabel.as_closest_canonical(drawn)
    off = (np.indices(there.shape).T - [2, 3, 4]) * there.header.get_zooms()
    wanted = (np.linalg.norm(off, axis=-1) <= 6).T & (np.indices(there.shape)[2] == 4)
    np.testing.assert_array_equal(np.asanyarray(there.dataobj), np.where(wanted, 2, 0))


def test_letters_are_those_of_radiologists() -> None:
    """The patient's right is on the left, and from the side the front is."""
    letters = page("console.log(JSON.stringify(slices.PLANES))")
    assert {plane: "".join(part["letters"]) for plane, part in letters.items()} == {
        "axial": "RLAP",
        "coronal": "RLSI",
        "sagittal": "APSI",
    }
    code = """
    const space = new slices.Space({ size: [10, 20, 30], affine: [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]] });
    const canvas = { width: 300, height: 300 };
    console.log(JSON.stringify(Object.keys(slices.PLANES).map((plane) => {
      const frame = slices.frameOf(canvas, space, plane);
      return slices.placeAt(canvas, space, plane, { x: frame.left + 1, y: frame.top + 1 }, [5, 5, 5]);
    })));"""
    assert page(code) == [[9, 19, 5], [9, 5, 29], [5, 19, 29]]
