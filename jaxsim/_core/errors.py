"""What a user is told when an input cannot be used."""

import difflib
import reprlib
from collections.abc import Iterable

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 160


class InputError(ValueError):
    """An input that cannot be used: which field, its value, what is wrong and what to do.

    `str()` is one line, "field = value: problem; remedy". The command line prints it and exits with status 2.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str = ""):
        # All four go to the base class too, so that the error survives pickling between processes.
        super().__init__(field, value, problem, remedy)
        self.field = field
        self.value = value
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        tail = f"; {self.remedy}" if self.remedy else ""
        return " ".join(f"{self.field} = {_SHORT.repr(self.value)}: {self.problem}{tail}".split())


def suggest(name: str, names: Iterable[str], otherwise: str = "") -> str:
    """The names nearest to `name`, as text: "did you mean 'x'?".

    Where none is near it is `otherwise`, or the list of all of them.
    """
    known = sorted({str(n) for n in names})
    if not known and not otherwise:
        return "there is nothing to choose from"
    folded = {n.casefold(): n for n in known}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(folded[n]) for n in near) + "?"
    return otherwise or "choose from " + ", ".join(known)
