"""Profiles: KLQUANT_HYPOTHESIS_PROFILE=dev (the default), ci or nightly."""

import os

from hypothesis import settings

settings.register_profile("dev", max_examples=50, deadline=None, database=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("dev"), max_examples=100, derandomize=True)
settings.register_profile("nightly", settings.get_profile("dev"), max_examples=2000)
settings.load_profile(os.environ.get("KLQUANT_HYPOTHESIS_PROFILE", "dev"))
