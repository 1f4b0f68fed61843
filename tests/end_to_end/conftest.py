"""The imports of forked ranks and programs."""

import tests.preload  # noqa: F401
