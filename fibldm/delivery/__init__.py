"""What leaves the lab, and what comes from others.

* ``export``: a run as a bundle; ``card``, ``configurations``, ``licences``: its parts
* ``literals``: parts of a configuration without references and expressions
* ``verify``: does a bundle do what it says?
* ``import_weights``: other people's weights; ``foreign``, ``foreign_networks``, ``conversion``: how they are read
"""
