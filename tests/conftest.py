"""Settings of the whole suite: property tests are the same in every run, and small."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "tokenthrift", max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tokenthrift")
