"""Words about time, and a line that replaces itself while something long is under way."""

import sys


def clock(seconds: float) -> str:
    """Seconds in words: '42 s', '17 min', '2 h 05 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class TransientLine:
    """A line that replaces itself: in a notebook by a display that ends empty, in a terminal by a carriage return."""

    def __init__(self):
        self.handle = None
        if "ipykernel" in sys.modules:
            from IPython.display import display

            self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, text: str) -> None:
        """Replace the line; the empty text removes it."""
        if self.handle:
            self.handle.update({"text/plain": text}, raw=True)
        elif sys.stderr.isatty():
            print(f"\r{text:100s}", end="" if text else "\r", file=sys.stderr, flush=True)
