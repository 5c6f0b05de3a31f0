"""How fast, how much memory, how good, against whom: ``flux2-local bench``.

``contenders`` is the table of what can be measured, ``peers`` builds those that are not ours; ``runner`` lets them work in turn,
each in a process of its own (``worker``), and ``results`` is what it keeps; ``compare`` reads two of them.
``counts`` counts what does not depend on the clock, for the tests that watch for regressions.
"""
