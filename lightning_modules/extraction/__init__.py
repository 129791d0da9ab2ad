"""What is said in a text: events, relations and entities; and answers to questions about it."""

from .daguan_ie import DaguanIE
from .dgcnn import DGCNN
from .entity_linking import EntityLinker
from .gplinker import EventGPLinker
from .gplinker_relation import RelationGPLinker
from .lic2020_event import Lic2020Event
from .lic2020_mrc import Lic2020MRC
from .lic2020_relation import Lic2020Relation
from .ner_crf import NerCRF
from .ner_global_pointer import NerGlobalPointer

__all__ = [
    "DGCNN",
    "DaguanIE",
    "EntityLinker",
    "EventGPLinker",
    "Lic2020Event",
    "Lic2020MRC",
    "Lic2020Relation",
    "NerCRF",
    "NerGlobalPointer",
    "RelationGPLinker",
]
