"""What libraries expect around a process and containers do not give: a user's name, and a home to keep caches in."""

import getpass
import logging
import os
import tempfile
import warnings
from pathlib import Path

_CACHES = {
    "XDG_CACHE_HOME": ".",
    "XDG_CONFIG_HOME": "config",
    "MPLCONFIGDIR": "matplotlib",
    "TRITON_CACHE_DIR": "triton",
}


def settle() -> None:
    """Make up for what is missing, by variables of the environment, before MONAI and Matplotlib look for it."""
    _name_the_user()
    home = Path(os.path.expanduser("~"))
    if not (home.is_absolute() and home.is_dir() and os.access(home, os.W_OK | os.X_OK)):
        caches = _cache_folder()
        for variable, inside in _CACHES.items():
            os.environ.setdefault(variable, str(caches / inside))
    # MONAI says before every command that this decoder of DICOM is missing, which nothing here uses
    warnings.filterwarnings("ignore", "NvImgCodecPydicomReader: nvImageCodec decoder plugin did not", UserWarning)
    logger = logging.getLogger("monai.data.nvimgcodec_pydicom_plugin")
    logger.addFilter(lambda record: not record.getMessage().startswith("nvImageCodec is not available"))


def _name_the_user() -> None:
    """PyTorch and MONAI ask for the name, which a user ID without an entry in /etc/passwd does not have."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = f"user{os.getuid()}" if hasattr(os, "getuid") else "user"


def _cache_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given)
    folder = Path(tempfile.gettempdir()) / f"fibldm-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        own = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
    except OSError:
        own = False
    return folder if own else Path(tempfile.mkdtemp(prefix="fibldm-"))
