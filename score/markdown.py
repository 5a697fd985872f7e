"""Tables as Markdown, aligned for those who read them in a terminal."""


def markdown_table(header, rows):
    """A table as Markdown, each line with its line break.

    Args:
        header: names of the columns.
        rows: lists of as many cells each, of any type.
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "".join(f"{line}\n" for line in lines)
