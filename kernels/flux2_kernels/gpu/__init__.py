"""The Triton implementations; importing a module here but ``operands`` and ``scaled_mm`` imports Triton and registers its ops."""
