"""`python -m pytest -p accelerator.plugin`: the tests run with the simulated accelerator as Accelerate's device."""

from . import install

install()
