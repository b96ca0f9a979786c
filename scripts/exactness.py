"""The same as `python benchmarks/exactness.py`."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "benchmarks" / "exactness.py"), run_name="__main__")
