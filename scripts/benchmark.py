"""Measure the speed of ddpm_ext beside installed Diffusers and write a markdown table.

python scripts/benchmark.py                                  # minutes on a quiet CPU
python scripts/benchmark.py --quick --output /tmp/bench.md   # a look, about a minute
python scripts/benchmark.py --num_threads 2
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from transformers import HfArgumentParser

from ddpm_ext.benchmark import BenchmarkOptions, run_benchmark


def main() -> None:
    parser = HfArgumentParser(BenchmarkOptions, description=__doc__, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    (options,) = cast(tuple[BenchmarkOptions], parser.parse_args_into_dataclasses(look_for_args_file=False))
    report = run_benchmark(options)
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report, encoding="utf-8")
    print(f"{report}\nWritten to {path}.")


if __name__ == "__main__":
    main()
