"""What leaves the lab: runs as bundles.

* ``literals``: parts of a configuration without references and expressions
* ``export``: a run as a bundle
"""
