"""The Triton implementations; importing a module here imports Triton and registers its ops, but for ``operands``, ``scaled_mm`` and
``int_mm``."""
