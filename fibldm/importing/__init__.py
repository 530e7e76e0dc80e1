"""Networks that others trained.

* ``import_weights``: their weights as a run of FibLDM
* ``bundle_run``: a bundle of FibLDM as the beginning of a run
* ``checkpoint``: read files of weights, and what lies beside them
* ``architecture``: from weights to the arguments of the network
* ``conversion``: to definitions that FibLDM builds, compared with the original
"""
