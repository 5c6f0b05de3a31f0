"""Pictures in bulk: a file of prompts becomes a folder of pictures, with nothing lost and nothing twice.

::

    lines (JSONL, CSV, text) + sweep (defaults, grid, seeds, repeat) -> Job -> pictures, in order
        -> engine (this process, or one per device) -> store (files, imagefolder, shards) + manifest

A picture is stored first and then gets its line in the manifest; the line is the proof that it is finished.
"""
