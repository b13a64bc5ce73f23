"""What stands between two turns of a model in a conversation that goes on, as token ids.

A conversation whose keys and values are kept holds the model's own tokens, thoughts and all. What
the chat template writes behind an answer, around what the user says next, and in front of the next
answer is put behind them as it is.
"""

from collections.abc import Sequence

from opcd.errors import InputError
from opcd.tasks.chat import Chat
from opcd.tasks.messages import Message, assistant, user
from opcd.tasks.template import ANSWER, REQUEST

ADVICE = "name a file with another template as chat_template"


class Between:
    """The tokens between two turns, the same for student and teacher.

    Raises InputError for a chat template that ends a turn without a token of its own, or writes
    what follows a turn otherwise behind the context.
    """

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._template = chat.template
        end = chat.template.frame.end
        if end is None:
            raise InputError(
                f"a conversation that goes on needs a chat template that ends the model's turns "
                f"with a special token, but that of {self._template.name!r} writes none; {ADVICE}"
            )
        self._end = end
        self._end_text = str(self._template.tokenizer.convert_ids_to_tokens(end))
        asked = self._asked(REQUEST)
        alone = self._behind(chat.student_messages(asked))
        prompted = self._behind(chat.teacher_messages(asked))
        if alone != prompted:
            raise InputError(
                f"the chat template of {self._template.name!r} must write what follows a turn the "
                f"same way with and without the context, got {prompted!r:.100} and "
                f"{alone!r:.100}; {ADVICE}"
            )

    def ids(self, said: str, completion_ids: Sequence[int]) -> list[int]:
        """What follows a completion: its end, where it was cut in front of it, what the user says,
        and what opens the next turn."""
        text = self._behind(self._chat.student_messages(self._asked(said)))
        if said.strip() not in text:
            raise InputError(
                f"the chat template of {self._template.name!r} must keep what the user says, but "
                f"drops or alters {said[:60]!r}; {ADVICE}"
            )
        ids = self._template.encode(text)
        assert ids[0] == self._end, "a special token is one token"
        return ids[1:] if completion_ids[-1] == self._end else ids

    def _asked(self, said: str) -> list[Message]:
        return [user(REQUEST), assistant(ANSWER), user(said)]

    def _behind(self, messages: Sequence[Message]) -> str:
        """From the end of the first answer on."""
        text = self._template.text(messages).rpartition(ANSWER)[2]
        at = text.find(self._end_text)
        if at < 0 or text[:at].strip():
            raise InputError(
                f"the chat template of {self._template.name!r} must end every turn of the model "
                f"with {self._end_text}, as it ends the last one, got {text[:60]!r}; {ADVICE}"
            )
        return text[at:]
