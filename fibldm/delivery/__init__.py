"""What leaves the lab.

* ``export``: a run as a bundle; ``model_card``, ``configurations``: its parts
* ``resolve``: parts of a configuration without references and expressions
* ``verify``: does a bundle do what it says?
* ``fetch``: bundles and data from elsewhere, when asked
"""
