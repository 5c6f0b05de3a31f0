"""Train the bundled model from nothing: draw scenes, caption them, fit every component, export the hub layout.

    python -m scripts.train_tiny STAGE --work DIR [--minutes N]

The stages, in order, are listed by ``--help``; each reads what the ones before it left in the
work folder, writes checkpoints as it goes, and goes on from them when it is started again.
"""
