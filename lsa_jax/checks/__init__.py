"""What must hold on any device, checked on the one at hand: `lsa_jax.selftest` runs all of it."""
