"""Property tests may take their time: a loaded machine is no reason to fail."""

from __future__ import annotations

import os

from hypothesis import Phase, settings

settings.register_profile("unhurried", deadline=None)
# For tests/support/mutations.py, which asks only whether a test fails: the smallest example is not looked for.
settings.register_profile("unshrunk", deadline=None, phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "unhurried"))
