"""How long the TPU compiler's schedule of a Pallas kernel is: the module's text does not say, its dumps do."""

from __future__ import annotations

import atexit
import functools
import os
import pathlib
import re
import shutil
import tempfile

FLAGS = (
    "--xla_jf_dump_to={folder}",
    "--xla_jf_dump_llo_text=true",
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*",
    "--xla_jf_dump_hlo_text=false",
)
"""Of libtpu: the last schedule of everything that it compiles, and an analysis of each."""


@functools.cache
def schedule_folder() -> pathlib.Path:
    """Where libtpu writes its schedules from now on: a folder of this process, removed at its end.

    libtpu reads its flags when it is loaded; where that has happened before, the folder stays empty.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ctx_jax_schedules_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = [os.environ.get("LIBTPU_INIT_ARGS", ""), *(flag.format(folder=folder) for flag in FLAGS)]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags).strip()
    return folder


def clear_schedules(folder: pathlib.Path) -> None:
    """Forgets the schedules of what was compiled before: their names come again."""
    for path in folder.iterdir():
        path.unlink()


def kernel_bundles(folder: pathlib.Path) -> dict[str, int]:
    """Scheduled bundles by the name of the instruction: of a kernel, those of one step of its grid."""
    found = {}
    for path in sorted(folder.glob("*schedule-analysis_final_bundles*")):
        name = re.match(r"\d+-(.+)-\d+-schedule", path.name)
        count = re.search(r"non empty scheduled bundles: (\d+)", path.read_text(errors="replace"))
        if name and count:
            found[name[1]] = int(count[1])
    return found
