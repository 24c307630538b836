"""The configuration groups, shipped as package `spepolicy_conf` (Hydra: `pkg://spepolicy_conf`)."""
