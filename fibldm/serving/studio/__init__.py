"""A service on HTTP, with a page: an API for programs, and for people a page that needs no network but this one.

* ``limits``: how much anybody may send
* ``access``: the token, the cookie of a browser, the names of this machine
* ``guard``: what every request must pass before anything reads it
* ``bounds``: what came must not grow when it is read
* ``uploads``: from the parts of a request to the files of an item
* ``views``: what the API tells
* ``bundle_facts``: what it tells of the generator
* ``archive``: folders as a zip that is never whole
* ``masks``: for the page, as NIfTI
* ``refusals``: in one form
* ``page``: the page, and the ways in which a browser is signed in
* ``room``: for so many requests and jobs
* ``related``, ``dicom_results``, ``dicomweb``: masks by STOW-RS, results by WADO-RS and QIDO-RS
* ``described``: bodies, to OpenAPI
* ``api``: the addresses
* ``server``: uvicorn in a thread, and connections that say nothing
"""

from fibldm.serving.studio.access import Access, kept_token, new_token
from fibldm.serving.studio.api import studio_app
from fibldm.serving.studio.dicomweb import structure_sets
from fibldm.serving.studio.limits import Limits
from fibldm.serving.studio.server import listening, serving

__all__ = ["Access", "Limits", "kept_token", "listening", "new_token", "serving", "structure_sets", "studio_app"]
