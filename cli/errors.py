"""Which exceptions are the user's input, and how each is said in one line."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

from ..errors import InputError

# By name, because naming the classes would import Hydra and Lightning only to report that a file is missing.
_INPUT_EXCEPTIONS = {
    "hydra.HydraException",
    "omegaconf.OmegaConfBaseException",
    "lightning_fabric.MisconfigurationException",
    "pytorch_lightning.MisconfigurationException",
}
_FILE_EXCEPTIONS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_MAX_LISTED = 12


def explain(error: BaseException) -> str | None:
    """Say in one line what is wrong with the input; None when the error is a bug of the program."""
    if isinstance(error, InputError) or _names(error) & _INPUT_EXCEPTIONS:
        return one_line(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = error.filename or ("the run directory" if error.strerror else one_line(error).rstrip("."))
        return f"{what}: no space left on the disk; free some, or choose run_dir=PATH"
    if isinstance(error, _FILE_EXCEPTIONS) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or 'cannot be opened').lower()}"
    if isinstance(error, ImportError) and "pip install" in str(error):
        return one_line(error)  # an optional package
    if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
        return f"the checkpoint is of another model: {one_line(error)}; choose another run_dir or checkpoint"
    return None


def one_line(error: BaseException | str, limit: int = 400) -> str:
    """The text of an error on one line, shortened to `limit` characters."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def suggest(word: str, options: Iterable[str], otherwise: str = "see --help") -> str:
    """The nearest of `options`, or all of them when none is near and they are few.

    Returns:
        "did you mean X?", "choose from: A, B" or `otherwise`.
    """
    known = sorted(set(options))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    # A right name at the wrong place: `max_epochs` for `trainer.max_epochs`.
    tail = [name for name in known if name.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    if tail:
        return f"did you mean {tail[0]}?"
    return f"choose from: {', '.join(known)}" if 0 < len(known) <= _MAX_LISTED else otherwise


def _names(error: BaseException) -> set[str]:
    return {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
