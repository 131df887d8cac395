"""What the lines of encoded rows add up to: states, which parts of a file have and the file merges."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

from pytest_mistral_lora.conformance.encoded.evaluation import EvaluationPrompts
from pytest_mistral_lora.conformance.encoded.file_faults import AnswerBalance
from pytest_mistral_lora.conformance.encoded.side_faults import SideLengths
from pytest_mistral_lora.conformance.encoded.template_cause import ExplainedFindings
from pytest_mistral_lora.conformance.row_pass import RowPass
from pytest_mistral_lora.errors import counted


@dataclass
class LineFigures:
    """The numbers of lines, and why some checks may have nothing to judge.

    Attributes:
        tokens: Tokens of all judged rows, without padding.
        supervised: Supervised tokens of the judged rows.
        packed: Lines that hold several conversations.
        run_on: Those of them whose positions run on, under a mask that keeps the conversations apart.
        masked: Lines whose labels come from a mask beside the ids.
        columns: Number of lines by each column that says what is trained on.
        read_back: Lines without messages, whose conversations are read back from their ids.
        without_labels: Answers of these lines without a label, which are read as answers of weight 0.
        conversations: Conversations that the rules on rows have seen.
        other_kinds: Rows of other kinds that they have seen, by the kind in words.
        has_labels: Whether a row has labels.
        is_scored_whole: Whether a row has none by its kind.
        asks: Whether a row is a prompt of an evaluation, whose answer is not trained on.
    """

    tokens: int = 0
    supervised: int = 0
    packed: int = 0
    run_on: int = 0
    masked: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    read_back: int = 0
    without_labels: int = 0
    conversations: int = 0
    other_kinds: Counter[str] = field(default_factory=Counter)
    has_labels: bool = False
    is_scored_whole: bool = False
    asks: bool = False

    @property
    def words(self) -> str:
        """What the labels are made of, and which rows have no messages, for a summary; empty for plain rows."""
        masks = f"; the labels of {self.masked:,} are made of a mask" if self.masked else ""
        if self.columns.keys() - {"labels"}:
            masks += f"; what is trained on: {', '.join(f'{key} ({n:,})' for key, n in sorted(self.columns.items()))}"
        read = f"; {self.read_back:,} without messages, read back from their ids" if self.read_back else ""
        weights = f"; {counted(self.without_labels, 'answer')} in them without a label" if self.without_labels else ""
        return f"{masks}{read}{weights}"

    def extend(self, other: LineFigures) -> None:
        """Add other lines."""
        for one in fields(self):
            mine, more = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Counter):
                mine.update(more)
            else:
                setattr(self, one.name, mine or more if isinstance(mine, bool) else mine + more)


@dataclass
class AuditState:
    """The states of a file, or of a part of it; parts merge in their order.

    What the order of lines decides, such as a number that comes again, is no state: a part does not know the lines
    before it. The collecting process judges that with a few bytes of each line, in the order of the file.

    Attributes:
        figures: The numbers of lines.
        sides: The answers of preference records.
        balance: The texts of answers, expected and trained.
        following: Those of lines whose labels follow an objective that nobody declares.
        prompts: The prompts of an evaluation.
        by_template: The findings that the chat template of the tokenizer explains.
        by_pad: The findings that its pad token explains.
        rows: The rows, for the rules on rows and on whole files.
    """

    figures: LineFigures = field(default_factory=LineFigures)
    sides: SideLengths = field(default_factory=SideLengths)
    balance: AnswerBalance = field(default_factory=AnswerBalance)
    following: AnswerBalance = field(default_factory=AnswerBalance)
    prompts: EvaluationPrompts = field(default_factory=EvaluationPrompts)
    by_template: ExplainedFindings = field(default_factory=ExplainedFindings)
    by_pad: ExplainedFindings = field(default_factory=ExplainedFindings)
    rows: RowPass = field(default_factory=RowPass)

    def extend(self, other: AuditState) -> None:
        """Add the lines of a later part."""
        for one in fields(self):
            getattr(self, one.name).extend(getattr(other, one.name))
