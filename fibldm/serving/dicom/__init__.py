"""A DICOM node: masks come by C-STORE, and synthetic series leave by it.

* ``peers``: who may call, and who gets results
* ``limits``: what a caller may ask of the node
* ``listening``: connections, bounded before anything of them is understood
* ``objects``: what comes, as a file and in what the node must know of it
* ``intake``: what becomes of it
* ``door``: associations and C-STORE
* ``structure_sets``: RT structure sets that wait for their series
* ``sending``: results, until they are acknowledged
* ``node``: all of it around one service

Needs pynetdicom (the extra ``node``), but for ``objects``, ``intake`` and ``structure_sets``, which the studio has too.
"""
