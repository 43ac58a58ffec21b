"""What holds for all tests: none depends on how busy the machine is, and none touches the user's calibrations."""

import os
import tempfile

from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

HOME = tempfile.TemporaryDirectory()
os.environ["SACCADE_HOME"] = HOME.name
