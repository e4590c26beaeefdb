"""Show names that users chose."""


def printable(text: str) -> str:
    """Return text with its control characters escaped, so that it is one line and commands no terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
