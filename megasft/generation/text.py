"""Tokens into text, as far as it is certain: bytes of one character may come in several tokens."""

from megasft.data.tokenizer import ChatTokenizer

UNFINISHED = "\ufffd"  # what a tokenizer decodes bytes to that are no character (yet)
MOST_UNFINISHED = 3  # bytes of a UTF-8 character that lacks one


class TextStream:
    """`push` each token, print what it returns, and `finish`: all of it together is the decoded text."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the last tokens that were given out, which spacing may depend on
        self._tokens: list[int] = []  # those behind them, of which some character is not finished
        self._given = 0  # characters of `_tokens` that were given out

    def push(self, token: int) -> str:
        """What is certain now and was not before."""
        self._tokens.append(token)
        text = self._text()
        certain = text.rstrip(UNFINISHED)
        certain = text[: max(len(certain), len(text) - MOST_UNFINISHED)]
        new, self._given = certain[self._given :], max(self._given, len(certain))
        if certain == text:
            self._context, self._tokens, self._given = self._tokens, [], 0
        return new

    def finish(self) -> str:
        """What is left, with a replacement character for bytes that never became one."""
        rest = self._text()[self._given :]
        self._context, self._tokens, self._given = [], [], 0
        return rest

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._tokens)
        if text.startswith(before):
            return text[len(before) :]
        # SentencePiece decodes a run of byte tokens as a whole: one that is wrong, or missing, spoils them all.
        if len(self._tokens) <= MOST_UNFINISHED:
            return UNFINISHED * len(self._tokens)
        self._context = []
        return self._tokenizer.decode(self._tokens)
