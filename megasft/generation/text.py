"""Tokens to text as they come: the bytes of a character may be split over several tokens."""

from megasft.data.tokenizer import ChatTokenizer

UNFINISHED = "\ufffd"  # a tokenizer decodes bytes that are no character, or not yet, to this
MOST_UNFINISHED = 3  # bytes of a UTF-8 character that lacks one


class TextStream:
    """`push` each token, print what it returns, and `finish`: all of it together is the decoded text."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the last tokens given out; spacing may depend on them
        self._tokens: list[int] = []  # the tokens after them, which end in an incomplete character
        self._given = 0  # characters of `_tokens` given out already

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._tokens.append(token)
        text = self._text()
        certain = text.rstrip(UNFINISHED)
        certain = text[: max(len(certain), len(text) - MOST_UNFINISHED)]
        new, self._given = certain[self._given :], max(self._given, len(certain))
        if certain == text:
            self._context, self._tokens, self._given = self._tokens, [], 0
        return new

    def finish(self) -> str:
        """The rest of the text, with replacement characters for incomplete ones."""
        rest = self._text()[self._given :]
        self._context, self._tokens, self._given = [], [], 0
        return rest

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._tokens)
        if text.startswith(before):
            return text[len(before) :]
        # SentencePiece decodes a run of byte tokens together: a wrong or missing one invalidates the run.
        if len(self._tokens) <= MOST_UNFINISHED:
            return UNFINISHED * len(self._tokens)
        self._context = []
        return self._tokenizer.decode(self._tokens)
