"""Breaks streamed text at words on a terminal: a word that reaches the edge is taken back and begins the next line."""

from __future__ import annotations

NARROWEST = 20
"""Below this many columns the terminal breaks the lines itself."""
TAB = 8


class WordWrap:
    """Follows the cursor over text that comes in pieces; nothing is held back, so no piece is late.

    The last column stays free: a cursor that waits there for the next line does not move back by whole columns.
    """

    def __init__(self) -> None:
        self._column = 0
        self._word = ""
        self._word_cells = 0

    def feed(self, text: str, columns: int) -> str:
        """The text for a terminal this wide, with line breaks between words."""
        from rich.cells import cell_len

        if columns < NARROWEST:
            return text
        out: list[str] = []
        for character in text:
            if character == "\n":
                self._line_ends()
                out.append(character)
            elif character in " \t":
                out.append(self._gap(character, columns))
            else:
                out.append(self._letter(character, cell_len(character), columns))
        return "".join(out)

    def word_ends(self) -> None:
        """Something else was written; what stands before it is not moved any more."""
        self._word, self._word_cells = "", 0

    def _line_ends(self) -> None:
        self._column = 0
        self.word_ends()

    def _gap(self, character: str, columns: int) -> str:
        cells = 1 if character == " " else TAB - self._column % TAB
        if self._column + cells >= columns:
            self._line_ends()
            return "\n"
        self._column += cells
        self.word_ends()
        return character

    def _letter(self, character: str, cells: int, columns: int) -> str:
        moved = ""
        if self._column + cells >= columns and self._column > 0:
            if self._word_cells < self._column < columns:
                moved = f"\x1b[{self._word_cells}D\x1b[K\n{self._word}" if self._word else "\n"
                self._column = self._word_cells
            elif self._column + cells > columns:
                self._column = 0  # a word longer than a line: the terminal breaks it, and it can still be copied as one
        self._column += cells
        if cells == 2:  # ideographs stand without spaces, a line may end after each of them
            self.word_ends()
        else:
            self._word += character
            self._word_cells += cells
        return moved + character
