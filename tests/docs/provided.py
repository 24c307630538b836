"""Which pages are tested, and what their commands find in the folder that they run in."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from .pages import ROOT, run

PAGES = tuple(
    str(path.relative_to(ROOT))
    for path in [
        ROOT / "README.md",
        *(ROOT / name / "README.md" for name in ("conf", "plugins", "experiments", "tests")),
        *sorted((ROOT / "experiments").glob("*/README.md")),
    ]
)

# What a host's ftrace buffer shows while ksmd write-protects a page and the guest reads it again.
TRACE = """\
# tracer: nop
    bash-135         [000] .....   100.000000: tracing_mark_write: SCENARIO ksm start
    ksmd-36          [001] d....   100.001000: mn_inv_start: (f+0x0/0x50) start=0xff0000 end=0xff1000 flags=0x1 event=1
    ksmd-36          [001] d....   100.001100: unmap_gfn: (kvm_unmap_gfn_range+0x0/0x50) start=0x40003 end=0x40004
    ksmd-36          [001] d....   100.001200: s2_unmap: (f+0x0/0x70) addr=0x40003000 size=0x1000
    qemu-252         [000] d....   100.002000: s2_map: (f+0x0/0x1) addr=0x40003000 size=0x1000 phys=0x4b4e prot=0x4
    bash-135         [000] .....   100.020000: tracing_mark_write: SCENARIO ksm end
"""

# What perf in a guest records in 100 ms: the only captures of a guest that this project can make.
CAPTURE = (
    "python -m spepolicy +policy=pin_while_enabled workload=compressor host=silent replicates=1 duration=100ms "
    "output.perf_data=true tracking=none"
)


def provide(what: str, folder: Path) -> None:
    """Put into *folder* what a block says that it needs; nothing for an empty text."""
    if what == "trace":
        (folder / "host.trace").write_text(TRACE, encoding="utf-8")
    elif what == "night":
        shutil.copy(ROOT / "tests" / "data" / "host_numa.report.gz", folder / "host.trace.gz")
        with tempfile.TemporaryDirectory() as name:
            status, output = run(CAPTURE, Path(name))
            assert status == 0, output
            (capture,) = Path(name).glob("outputs/*/*/*.perf.data")
            shutil.copy(capture, folder / "perf.data")
    elif what == "run":
        status, output = run("python -m spepolicy +policy=eager_pin replicates=2 duration=2ms", folder)
        assert status == 0, output
    else:
        assert not what, f"needs={what}: known are trace, run and night"
