"""Rewards: terms beside distribution matching, at the generator's own samples x0 (docs/method.md)."""
