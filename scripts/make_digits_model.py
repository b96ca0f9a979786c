r"""Write the packaged model: a calibrated digits run in half precision, with its card and its scores.

    python scripts/train.py                                                              # runs/digits
    python scripts/calibrate.py --extractor pixels --num_samples 2000 --metrics fid --num_inference_steps none \
        --solver_steps 3,4,5,6,8,10                                                      # runs/digits/calibrated
    python scripts/make_digits_model.py --output_dir ddpm_ext/models/digits              # over the committed one

Weights are rounded to float16 before they are scored. A minute on one core.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ddpm_ext.evaluation.config import EvalConfig
from ddpm_ext.evaluation.evaluate import evaluate
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.publishing.model_card import export_card
from ddpm_ext.schedulers.solver import fitted_solvers


def main() -> None:
    """Round, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/digits"), help="The run: its config.json is the record.")
    parser.add_argument("--pipeline", type=Path, help="The calibrated pipeline; none: calibrated/pipeline of the run.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/digits-model"))
    parser.add_argument("--num_samples", type=int, default=2000)
    options = parser.parse_args()

    pipeline = DDPMExtPipeline.from_pretrained(options.pipeline or options.run / "calibrated" / "pipeline")
    fitted = fitted_solvers(pipeline.scheduler.config)
    if fitted is None:
        raise SystemExit("The pipeline has no fitted solver: scripts/calibrate.py --solver_steps 3,4,5,6,8,10.")
    pipeline.unet.half()
    run = options.run / "half" / "ddpm-digits"  # a name that a record may hold
    pipeline.save_pretrained(run / "pipeline")
    shutil.copyfile(options.run / "config.json", run / "config.json")
    config = EvalConfig(
        model=str(run / "pipeline"),
        metrics="fid",
        sampler="solver",
        num_inference_steps=",".join(map(str, fitted.solvers)),
        num_samples=options.num_samples,
        extractor="pixels",
        few_steps=False,
        cpu=True,
    )
    evaluate(config)
    shutil.copytree(run / "pipeline", options.output_dir, dirs_exist_ok=True)
    export_card(run, options.output_dir)
    print(f"The model lies in {options.output_dir}.")


if __name__ == "__main__":
    main()
