"""The whole way in one command, on phantoms.

* ``demo``: make phantoms, train, synthesise, measure, report
* ``chest_metrics``: figures of chest phantoms, which need no network
"""
