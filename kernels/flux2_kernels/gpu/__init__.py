"""The Triton implementations; importing a module here imports Triton and registers its torch ops."""
