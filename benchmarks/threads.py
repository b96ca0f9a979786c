"""Training speed on a CPU by threads and by neighbours, into docs/benchmark.md.

python -m benchmarks.threads                          # 20 minutes on a quiet machine of two cores or more
python -m benchmarks.threads --seconds 5 --output /tmp/threads.md
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.options import option
from ddpm_ext.run_dir import environment

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("<!-- threads: begin -->", "<!-- threads: end -->")
BUSY = "while True: pass"
BUSY_TORCH = "import torch; torch.set_num_threads(2); x = torch.randn(512, 512)\nwhile True: x @ x"
# Environment of a setting; None takes the variable away, so that the command's own default holds.
SETTINGS: dict[str, dict[str, str | None]] = {
    "default": {"OMP_NUM_THREADS": None},
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "300000"},
    "2 threads, short spin": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"},
    "2 threads, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
}
NEIGHBOURS: dict[str, list[str]] = {
    "none": [],
    "one Python": [BUSY],
    "two Python": [BUSY, BUSY],
    "one torch, 2 threads": [BUSY_TORCH],
    "two torch, 2 threads each": [BUSY_TORCH, BUSY_TORCH],
}


@dataclass(frozen=True, kw_only=True)
class ThreadOptions:
    """What is measured and where it is written."""

    preset: str = option("digits", "Preset that is trained.")
    seconds: float = option(30.0, "Seconds of training of each cell, after its start.", above=0)
    output: str = option("docs/benchmark.md", "Markdown file whose section between the two marks is replaced.")


@contextmanager
def beside(programs: list[str]) -> Iterator[None]:
    """Keep neighbours busy until the block ends; they are started early enough to be seen in the load."""
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    running = [subprocess.Popen([sys.executable, "-c", program], env=env) for program in programs]
    try:
        time.sleep(3 if programs else 0)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def images_per_second(options: ThreadOptions, changes: dict[str, str | None]) -> float:
    """Median of the log's speeds of a training that is stopped after `seconds`; 0 where it logged nothing."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "DDPM_EXT_"))}
    env |= {name: value for name, value in changes.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", f"--preset={options.preset}", "--cpu=true", "--logging_steps=5", f"--output_dir={folder}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "ddpm_ext", *words],
            cwd=ROOT,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        log, waited = Path(folder, "log.jsonl"), time.monotonic() + 120
        while not log.exists() and process.poll() is None and time.monotonic() < waited:
            time.sleep(0.2)
        try:
            time.sleep(options.seconds)
        finally:
            process.kill()
            process.wait()
        lines = log.read_text("utf-8").splitlines() if log.exists() else []
        speeds = [json.loads(line)["images_per_second"] for line in lines[1:] if line.endswith("}")]
    return median(speeds) if speeds else 0.0


def section(options: ThreadOptions) -> str:
    """Measure every cell; the section as markdown."""
    hardware, before = environment()["hardware"], os.getloadavg()[0]
    lines = [
        MARKS[0],
        "## Threads and neighbours",
        "",
        f"`python -m benchmarks.threads --seconds {options.seconds:g}`: images/s of the preset {options.preset} on "
        f"{hardware['processor']}, {hardware['cores']} cores; load of the machine before the first cell {before:.1f} "
        "(what others did is in every row). In brackets the share of the row's best.",
        "",
        f"| neighbours | {' | '.join(SETTINGS)} |",
        f"| --- |{' ---: |' * len(SETTINGS)}",
    ]
    for name, programs in NEIGHBOURS.items():
        with beside(programs):
            cells = [images_per_second(options, changes) for changes in SETTINGS.values()]
        best = max(max(cells), 1e-9)
        lines.append(f"| {name} | {' | '.join(f'{cell:,.0f} ({cell / best:.2f})' for cell in cells)} |")
        print(lines[-1], flush=True)
    return "\n".join([*lines, MARKS[1]])


def main() -> int:
    """Measure, and put the section into the page."""
    options = parse_options(ThreadOptions, __doc__ or "")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the neighbours would stay
    path, text = Path(options.output), section(options)
    page = path.read_text("utf-8") if path.exists() else "# Speed\n"
    between = re.compile(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", re.DOTALL)
    page = between.sub(lambda _: text, page) if between.search(page) else f"{page.rstrip()}\n\n{text}\n"
    path.write_text(page, encoding="utf-8")
    print(f"Written to {path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
