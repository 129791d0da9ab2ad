"""A tokenizer from the files of a published model, or from those that a tokenizer has saved."""

from pathlib import Path

from ...errors import InputError
from .bpe import ByteLevelBPETokenizer
from .characters import CharTokenizer
from .files import BPE_VOCAB_FILE, CONFIG_FILE, MERGES_FILE, TOKENIZER_FILE, VOCAB_FILE, read_object
from .interface import Tokenizer
from .roformer import RoFormerTokenizer
from .wordpiece import WordPieceTokenizer
from .words import WordTokenizer

MODEL_CONFIG_FILE = "config.json"
WITH_VOCABULARY = {
    "BertTokenizer": WordPieceTokenizer,
    "RoFormerTokenizer": RoFormerTokenizer,
    "WordTokenizer": WordTokenizer,
}
CLASSES = (*WITH_VOCABULARY, "GPT2Tokenizer")
ANY_CLASS = ("PreTrainedTokenizer", "TokenizersBackend")
"""Names under which transformers saves a tokenizer of whatever scheme."""
LOOKED_FOR = (VOCAB_FILE, BPE_VOCAB_FILE, MERGES_FILE, TOKENIZER_FILE)


def load_tokenizer(place: str | Path) -> Tokenizer:
    """Read the tokenizer whose files lie in a folder.

    Looked for in this order: `vocab.txt`, which holds characters or words if `CharTokenizer` or `WordTokenizer` has
    saved it and WordPiece otherwise, over jieba's words if `tokenizer_config.json` or `config.json` name RoFormer;
    `vocab.json` with `merges.txt`, byte-level BPE; `tokenizer.json`, WordPiece or byte-level BPE.

    Args:
        place: the folder, or one of these files, which is then the one that is read.

    Raises:
        InputError: none of the files is there, one is broken, or the scheme is another.
    """
    place = Path(place)
    folder, names = (place.parent, (place.name,)) if place.is_file() else (place, LOOKED_FOR)
    found = next((name for name in names if name in LOOKED_FOR and (folder / name).is_file()), None)
    if found is None:
        raise InputError(
            f"load_tokenizer({str(place)!r}): looked for {', '.join(LOOKED_FOR)}; give a folder with one of them"
        )
    if _holds_characters(folder / TOKENIZER_FILE):
        return CharTokenizer.load(folder)
    name = _class_name(folder)
    if found == VOCAB_FILE:
        return WITH_VOCABULARY.get(name, WordPieceTokenizer).load(folder)
    if found == TOKENIZER_FILE:
        return _from_json(folder / TOKENIZER_FILE, name)
    return ByteLevelBPETokenizer.load(folder)


def _holds_characters(path: Path) -> bool:
    return path.is_file() and "half_width" in read_object(path)


def _class_name(folder: Path) -> str:
    """The class that the model was published with, empty where its files do not say."""
    for path in (folder / CONFIG_FILE, folder / MODEL_CONFIG_FILE):
        config = read_object(path) if path.is_file() else {}
        for key, value in (("tokenize_chinese_chars", True), ("add_prefix_space", False)):
            if config.get(key, value) is not value:
                raise InputError(f"{path}: {key}={config[key]}: only {value} can be read")
        name = config.get("tokenizer_class") or ("RoFormerTokenizer" if config.get("model_type") == "roformer" else "")
        name = name.removesuffix("Fast")
        if name and name not in (*CLASSES, *ANY_CLASS):
            raise InputError(f"{path}: tokenizer_class={name}: use a model with one of {', '.join(CLASSES)}")
        if name:
            return name
    return ""


def _from_json(path: Path, name: str) -> Tokenizer:
    kind = read_object(path).get("model", {}).get("type")
    if kind == "WordPiece":
        scheme = RoFormerTokenizer if name == RoFormerTokenizer.tokenizer_class else WordPieceTokenizer
        return scheme.from_json(path)
    if kind == "BPE":
        return ByteLevelBPETokenizer.from_json(path)
    raise InputError(f"{path}: model.type={kind!r}: only WordPiece and byte-level BPE can be read")
