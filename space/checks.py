"""Refuses what the app was sent and cannot use, in a sentence for the visitor."""

import reprlib

import gradio as gr
from gradio.exceptions import InvalidPathError
from gradio_client.utils import is_file_obj, is_http_url_like, traverse

from pictures import UPLOAD_FIRST, refusal


def check_number(value: object, low: int, high: int, name: str) -> float:
    """Return a number from low to high; raise gr.Error for anything else, NaN and True included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise refusal(f"{name}: a number from {low} to {high}, please; got {reprlib.repr(value)}.")
    return value


def check_choice(value: object, choices: list[str], name: str) -> None:
    """Raise gr.Error if a value is not among the choices."""
    if value not in choices:
        raise refusal(f"{name}: one of {', '.join(choices)}, please; got {reprlib.repr(value)}.")


def check_flag(value: object, name: str) -> None:
    """Raise gr.Error if a value is neither True nor False."""
    if not isinstance(value, bool):
        raise refusal(f"{name}: true or false, please; got {reprlib.repr(value)}.")


class Blocks(gr.Blocks):
    """Gradio's Blocks that fetch no address and say what they refuse."""

    async def preprocess_data(self, block_fn, inputs, state=None, *rest, **options):
        """Check inputs before any function of the app gets them."""
        try:
            traverse(inputs, refuse_address, is_file_obj)
            return await super().preprocess_data(block_fn, inputs, state, *rest, **options)
        except gr.Error:
            raise
        except InvalidPathError as error:
            raise refusal(UPLOAD_FIRST) from error
        except Exception as error:
            got = reprlib.repr(inputs)
            message = f"Arguments as the page 'Use via API' shows them, please; got {got}."
            raise refusal(message) from error
        finally:  # Gradio keeps what a visitor sent, a whole picture too, without a limit of time
            if state:
                state.config_values.clear()


def refuse_address(file: dict) -> None:
    """Raise gr.Error for a file that would be downloaded."""
    if is_http_url_like(file["path"]):
        raise refusal("Upload a picture first: nothing is fetched from an address.")
