"""What a training needs, before it begins: an estimate.

* ``plan``: memory and minutes of all stages
* ``traced_step``, ``live_bytes``: a step on tensors without values, and the memory that it would hold
* ``timing``: a few real steps, by the clock
"""
