"""The one place where the `tokenizers` library encodes."""

from collections.abc import Sequence

import tokenizers

from ...errors import InputError


def run(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[tokenizers.Encoding]:
    """Encode texts without special tokens.

    Raises:
        InputError: a text holds half of a surrogate pair.
    """
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"encode({text!r:.60}): half of a surrogate pair; write the character whole") from error
    return backend.encode_batch(list(texts), add_special_tokens=False)
