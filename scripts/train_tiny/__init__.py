"""Train the bundled model from nothing: draw scenes, caption them, fit every component, export the hub layout.

    python -m scripts.train_tiny STAGE --work DIR [--minutes N]

``--help`` lists the stages in order, and after the last of them, export, the two that serve to train an exported model on. Each
reads what the ones before it left in the work folder, writes checkpoints as it goes, and goes on from them when it is started again.
"""
