"""The imports of forked ranks."""

import tests.preload  # noqa: F401
