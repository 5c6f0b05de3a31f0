"""The endpoint at home: fal's HTTP contract, a queue that survives, and a page to try it (extra ``[server]``).

::

    client -> gate (origin, key, proxy) -> routes -> desk (queue, SQLite) -> worker process (owns the device)

The HTTP process imports no torch and never generates; the worker process never speaks HTTP.
"""
