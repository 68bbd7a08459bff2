"""Hypothesis profiles, chosen by KLQUANT_HYPOTHESIS_PROFILE: dev (the default), ci, nightly, mutation."""

import os

from hypothesis import Phase, settings

settings.register_profile("dev", max_examples=50, deadline=None, database=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("dev"), max_examples=100, derandomize=True)
settings.register_profile("nightly", settings.get_profile("dev"), max_examples=2000)
settings.register_profile(  # for tests/tools/mutation: any failing example will do, so nothing is shrunk
    "mutation", settings.get_profile("ci"), max_examples=30, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile(os.environ.get("KLQUANT_HYPOTHESIS_PROFILE", "dev"))
