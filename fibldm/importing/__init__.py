"""Networks that others trained.

* ``import_weights``: their weights as a run of FibLDM
* ``checkpoint``: read files of weights, and what lies beside them
* ``architecture``: from weights to the arguments of the network
* ``conversion``: to definitions that FibLDM builds, compared with the original
"""
