"""``fibldm report``: one HTML file that shows what was made and how good it is."""

from pathlib import Path
from typing import Annotated, Any

import typer


def report(
    source: Annotated[
        Path, typer.Argument(help="Run folder, bundle, or folder of `fibldm evaluate` or `fibldm audit`.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file to write.")] = None,
    synthetic: Annotated[
        Path | None, typer.Option("--synthetic", help="Volumes to show: output folder of `fibldm synthesize`.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Work folder; default: that of the run, if it is still there.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="For a bundle: output folder of `fibldm evaluate --bundle`.")
    ] = None,
    audit: Annotated[
        Path | None, typer.Option("--audit", help="Output folder of `fibldm audit`; default: looked for in the source.")
    ] = None,
    with_real: Annotated[
        bool, typer.Option("--with-real", help="Show real scans, too: the report is patient data then.")
    ] = False,
    cases: Annotated[int, typer.Option(min=1, help="Maximum number of volumes shown.")] = 4,
    reader_study: Annotated[
        Path | None,
        typer.Option("--reader-study", help="Also write a blinded folder of real and synthetic volumes, and its key."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the reader study.")] = 0,
    trust: Annotated[bool, typer.Option("--trust", help="Accept a bundle that changed since export.")] = False,
) -> dict[str, Any]:
    """Write one HTML file that opens offline: volumes, figures, audit, training, data check, limits, licence."""
    from fibldm.cli.output import log_to_standard_error
    from fibldm.errors import FibldmError
    from fibldm.report.niivue import PACKAGE, find_niivue
    from fibldm.report.reader_study import write_reader_study
    from fibldm.report.report import ReportSettings, write_report

    log_to_standard_error()
    if out is None and reader_study is None:
        raise FibldmError("a report needs a file to go to; got none", "give --out report.html")
    outputs = []
    if out is not None:
        settings = ReportSettings(synthetic, data, evaluation, audit, with_real, cases, trust)
        size = write_report(source, out, settings)
        print(f"{out}: {size / 1e6:.1f} MB" + (", with real scans: patient data" if with_real else ""))
        if synthetic is not None and find_niivue() is None:
            print(f"note: 3-D needs the package {PACKAGE}: pip install 'fibldm[report]'")
        outputs.append(str(out))
    if reader_study is not None:
        study = write_reader_study(source, reader_study, synthetic=synthetic, data=data, seed=seed, trust=trust)
        print(f"{reader_study}: {study.real} real and {study.synthetic} synthetic volumes; the key is {study.key}")
        outputs += [str(reader_study), str(study.key)]
    return {"outputs": outputs}
