"""Characters and the words they lie in, embedded together.  Shapes: B rows, T characters, W words, V word vectors."""

from torch import Tensor, nn


class MixedEmbedding(nn.Module):
    """The embedding of each character plus a projection of the frozen vector of its word.

    Args:
        vocab_size: characters; 0 is padding.
        dim: features of a character.
        word_dim: V, width of the word vectors; 0: there are none.
        dropout: rate on the sum.
    """

    def __init__(self, vocab_size: int, dim: int, word_dim: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocab_size, dim, padding_idx=0)
        self.words = nn.Linear(word_dim, dim, bias=False) if word_dim else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, words: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
        """Features `(B, T, dim)`.

        Args:
            ids: characters `(B, T)`.
            words: rows of `vectors` `(B, T)`; row 0, of zeros, is that of unknown words.
            vectors: `(W, V)`.
        """
        mixed = self.characters(ids)
        if self.words is not None and words is not None and vectors is not None:
            mixed = mixed + nn.functional.embedding(words, self.words(vectors))
        return self.dropout(mixed)
