"""Hypothesis profiles, chosen by KLQUANT_HYPOTHESIS_PROFILE: dev (the default), ci, nightly, mutation."""

import os
from importlib.util import find_spec

from hypothesis import HealthCheck, Phase, settings

collect_ignore = [] if find_spec("jax") else ["test_jax_props.py"]
patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=50, database=None, print_blob=True, **patient)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.register_profile("nightly", settings.get_profile("dev"), max_examples=2000)
settings.register_profile(  # for tests/tools/mutation: any failing example will do, so nothing is shrunk
    "mutation", settings.get_profile("ci"), max_examples=30, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile(os.environ.get("KLQUANT_HYPOTHESIS_PROFILE", "dev"))
