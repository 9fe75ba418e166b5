"""Settings every test shares."""

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "deterministic", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("deterministic")
torch.set_num_threads(1)  # the models and rows of tests are so small that threads only wait for each other
